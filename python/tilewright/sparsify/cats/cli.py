# SPDX-License-Identifier: Apache-2.0
"""`tw cats`: thresholds of a model to a file, what they drop on a text and cost, and how fast the operator is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tilewright.cli.quantize import calibration as calibration_batches
from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, use_threads

cats = typer.Typer(no_args_is_help=True, help="Thresholds of the gate activation (CATS): calibrate, judge, time.")

Text = Annotated[str, typer.Option("--text", metavar="NAME|FILE", help="A shipped corpus, or a text file.")]


@cats.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File of the thresholds: .json or .safetensors.")],
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of neurons to drop.")] = 0.5,
    ranking: Annotated[str, typer.Option("--ranking", help="activation, norm, up, or output.")] = "activation",
    text: Text = "speeches",
    batches: Annotated[int, typer.Option("--batches", min=1, help="Sequences.")] = 8,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of each.")] = 512,
    threads: Threads = None,
) -> None:
    """Write each layer's threshold to a file."""
    from tilewright.models import load, to_transformers
    from tilewright.sparsify.cats import calibrate_thresholds, save_thresholds

    use_threads(threads)
    loaded = load(model_path(model))
    data = calibration_batches(loaded, text, batches, length)
    chosen: Any = ranking
    found = calibrate_thresholds(
        to_transformers(loaded, dequantize=True), data, sparsity, "hist", ranking=chosen, progress=None
    )
    print(f"{save_thresholds(found, output)}: {len(found)} layers")


@cats.command("eval")
def evaluate(
    model: Model,
    thresholds: Annotated[Path, typer.Option("--thresholds", help="File written by `tw cats calibrate`.")],
    text: Text = "speeches",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text.")] = 1024,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of one window.")] = 512,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Sparsity of each layer on a text, and its perplexity with and without the thresholds, in float32."""
    from tilewright import evaluate as evaluation
    from tilewright.models import load, to_transformers
    from tilewright.sparsify.cats import load_thresholds, sparsified, thresholded

    use_threads(threads)
    loaded = load(model_path(model))
    module: Any = to_transformers(loaded, dequantize=True)
    ids = evaluation.text_corpus(loaded.tokenizer, text, "evaluation", max_tokens=tokens)
    found = load_thresholds(thresholds)
    dense = evaluation.perplexity(module, ids, window=window).perplexity
    with sparsified(module, thresholded(found)) as kept:
        sparse = evaluation.perplexity(module, ids, window=window).perplexity
    layers = kept.sparsity()
    if as_json:
        print_json({"dense": dense, "sparse": sparse, "ratio": sparse / dense, "sparsity": layers})
        return
    for name, share in layers.items():
        print(f"{name}  {100 * share:5.1f} % dropped")
    print(f"perplexity {sparse:.3f}, dense {dense:.3f}: ratio {sparse / dense:.4f}; mean {100 * kept.mean():.1f} %")


@cats.command()
def bench(
    hidden: Annotated[int, typer.Option("--hidden", min=1, help="D.")] = 2048,
    inner: Annotated[int, typer.Option("--inner", min=1, help="M.")] = 5632,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of neurons to drop.")] = 0.5,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Calls of each.")] = 20,
    threads: Threads = None,
) -> None:
    """Time of one token through a random float32 MLP: the operator beside torch's dense products."""
    import statistics
    import time

    import torch
    from torch.nn.functional import linear, silu

    from tilewright.ops import sparse_gated_mlp
    from tilewright.ops.sparse_gated_mlp import weight_bytes_read

    use_threads(threads)
    torch.manual_seed(0)
    gate, up, down_t = (torch.randn(inner, hidden) / hidden**0.5 for _ in range(3))
    down, x = down_t.T.contiguous(), torch.randn(1, hidden)
    threshold = torch.quantile(silu(linear(x, gate)).abs(), sparsity)
    works = {
        "dense": lambda: linear(silu(linear(x, gate)) * linear(x, up), down),
        "sparse": lambda: sparse_gated_mlp(x, gate, up, down_t, threshold),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    _, kept = sparse_gated_mlp(x, gate, up, down_t, threshold, return_kept=True)
    size = weight_bytes_read(kept, hidden)
    print(f"dense {1e3 * medians['dense']:.3f} ms, sparse {1e3 * medians['sparse']:.3f} ms")
    print(f"{medians['dense'] / medians['sparse']:.2f}x, {size / 1e6:.1f} of {3 * gate.numel() * 4 / 1e6:.1f} MB read")


VERBS = {"cats": cats}
