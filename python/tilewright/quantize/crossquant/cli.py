# SPDX-License-Identifier: Apache-2.0
"""`tw kernel-report`: how many activations of each layer low bits round to zero, and what that costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tilewright.cli.quantize import calibration
from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, use_threads

if TYPE_CHECKING:
    from tilewright.quantize.crossquant import LayerReport


def kernel_report(
    model: Model,
    bits: Annotated[int, typer.Option("--bits", min=2, max=8, help="Bits of the activations.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", min=0, max=1, help="CrossQuant's exponent of the row.")] = 0.15,
    text: Annotated[
        str,
        typer.Option("--calibration", metavar="NAME|FILE", help="speeches, moby-dick, encyclopedia, or a text file."),
    ] = "speeches",
    batches: Annotated[int, typer.Option("--batches", min=1, help="Calibration sequences.")] = 2,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of each.")] = 512,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Print, for each linear, the share of activations rounded to zero, the outlier ratio, and the output's SQNR."""
    from tilewright.models import load, to_transformers
    from tilewright.quantize.crossquant import calibrate
    from tilewright.quantize.crossquant import kernel_report as report

    path = model_path(model)
    use_threads(threads)
    loaded = load(path)
    module = to_transformers(loaded, dequantize=True)
    layers = report(module, calibrate(module, calibration(loaded, text, batches, length)), a_bits=bits, alpha=alpha)
    if as_json:
        print_json({"model": str(path), "bits": bits, "alpha": alpha, "layers": [asdict(layer) for layer in layers]})
        return
    print("\n".join(table(layers)))


def table(layers: list[LayerReport]) -> list[str]:
    """Lines of text: one a layer, and their mean."""
    width = max(len(layer.name) for layer in layers)
    methods = list(layers[0].sqnr)
    lines = [
        f"{'linear':{width}}  zeros %  kernel %: per token  CrossQuant  max c/median c  SQNR dB: " + "  ".join(methods)
    ]
    for layer in layers:
        ratios = "  ".join(f"{layer.sqnr[method]:{len(method)}.1f}" for method in methods)
        lines.append(
            f"{layer.name:{width}}  {100 * layer.exact_zero:7.2f}  {100 * layer.kernel['per token']:19.2f}"
            f"  {100 * layer.kernel['CrossQuant']:10.2f}  {layer.outlier_ratio:14.1f}           {ratios}"
        )
    token, cross = (sum(one.kernel[m] for one in layers) / len(layers) for m in ("per token", "CrossQuant"))
    lines.append(f"mean kernel of {len(layers)} linears: {100 * token:.2f} % per token, {100 * cross:.2f} % CrossQuant")
    return lines


VERBS = {"kernel-report": kernel_report}
