# SPDX-License-Identifier: Apache-2.0
"""The part of FireQ's claim that is about weights alone: FP8 scales with and without p, exact against fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.formats import Int4Weight, quantize_int4
from tilewright.quantize.fireq._claim_model import Bench
from tilewright.quantize.fireq.channels import CONSUMERS, channel_factors
from tilewright.quantize.fireq.config import SITES, ChannelScaling
from tilewright.quantize.fireq.search import SiteError
from tilewright.quantize.simulate import fake_fp8
from tilewright.reference.low_bit import round_e4m3

SEEDS = (0, 1, 2)
PAPER_GROUP = 128
GROUP = 64
FP8 = torch.float8_e4m3fn


def folded(weight: Int4Weight) -> Tensor:
    """What fold mode multiplies with, e4m3(q s) / p."""
    p = weight.per_tensor_scale
    return round_e4m3(weight.dequantize() * p) / p


def relative_mse(got: Tensor, exact: Tensor) -> float:
    """||got - exact||^2 / ||exact||^2."""
    return float((got - exact).square().sum() / exact.square().sum())


def scale_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 3: Gaussian weights of std 0.02 * 2^-4, group 128; the worst of three seeds counts."""
    experiment.say("Gaussian weights")
    mse: dict[str, list[float]] = {"float32": [], "fp8": [], "fp8 with p": [], "exact": [], "fold": []}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(512, 1024, generator=generator) * 0.02 * 2.0**-4
        with_p = quantize_int4(w, PAPER_GROUP, FP8, "auto")
        mse["float32"].append(relative_mse(quantize_int4(w, PAPER_GROUP, torch.float32).dequantize(), w))
        mse["fp8"].append(relative_mse(quantize_int4(w, PAPER_GROUP, FP8).dequantize(), w))
        mse["fp8 with p"].append(relative_mse(with_p.dequantize(), w))
        mse["exact"].append(relative_mse(quantize_int4(w, PAPER_GROUP, torch.bfloat16).dequantize(), w))
        mse["fold"].append(relative_mse(folded(with_p), w))
    experiment.values["gaussian_mse"] = mse
    plain = min(a / b for a, b in zip(mse["fp8"], mse["float32"], strict=True))
    scaled = max(a / b for a, b in zip(mse["fp8 with p"], mse["float32"], strict=True))
    fold = max(a / b for a, b in zip(mse["exact"], mse["fold"], strict=True))
    yield at_least("FP8 scales without p: weight MSE over that of float32 scales", plain, 5.0, paper="underflow")
    yield at_most("FP8 scales with the default p: the same ratio", scaled, 1.03, paper="recovered by p")
    yield at_most("Gaussian weights: MSE of exact over fold mode", fold, 1.0)


def exact_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 4 on the model's own linears, and channel scaling against round-to-nearest by layer output."""
    experiment.say("layer by layer: exact against fold, scaled against round-to-nearest")
    inputs = bench.site_inputs()
    weight_ratios, output_ratios = [], []
    gains: dict[str, list[float]] = {site: [] for site in SITES}
    for index, layer in enumerate(bench.layers):
        for site in SITES:
            x = inputs[site][index]
            for name in CONSUMERS[site]:
                w = bench.weights[f"model.layers.{layer}.{name}.weight"]
                exact = quantize_int4(w, PAPER_GROUP, torch.bfloat16).dequantize()
                fold = folded(quantize_int4(w, PAPER_GROUP, FP8, "auto"))
                weight_ratios.append(relative_mse(exact, w) / relative_mse(fold, w))
                y = x @ w.T
                output_ratios.append(relative_mse(x @ exact.T, y) / relative_mse(x @ fold.T, y))
            gains[site].append(_gain(bench, layer, site, x))
    experiment.values["exact_over_fold"] = {"weights": weight_ratios, "outputs": output_ratios}
    experiment.values["fireq_over_rtn"] = gains
    count = len(weight_ratios)
    yield at_most(f"exact over fold, weight MSE, the worst of {count} linears", max(weight_ratios), 1.0)
    yield at_most(f"exact over fold, output MSE on real inputs, mean of {count}", sum(output_ratios) / count, 1.0)
    for site in ("mlp_input", "mlp_output"):
        mean = float(torch.tensor(gains[site]).log().mean().exp())
        yield at_most(f"{site}: FireQ's W4A8 output error over round-to-nearest's, geometric mean", mean, 1.0)


def _gain(bench: Bench, layer: int, site: str, x: Tensor) -> float:
    """Output error with channel scaling over that without, INT4 weights and FP8 activations in both."""
    prefix = f"model.layers.{layer}."
    error = SiteError(
        bench.weights, prefix, site, x, lambda w: quantize_int4(w, GROUP).dequantize(), fake_fp8, bench.config
    )
    factor = channel_factors(bench.weights, prefix, ChannelScaling(site), bench.config)
    return error(factor) / error(torch.ones_like(factor))
