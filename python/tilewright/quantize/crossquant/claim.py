# SPDX-License-Identifier: Apache-2.0
"""What CrossQuant promises, on SmolLM2-135M-Instruct and public-domain speeches (docs/methods/crossquant.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from tilewright.quantize.crossquant._claim_model import Bench

BITS = (8, 6, 4)
PLANT_SEEDS = (0, 1)
MIGRATIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def run(experiment: Experiment) -> Iterator[Row]:
    """Identities, the kernel, perplexities, the mechanism, planted outliers, SmoothQuant, speed, digits."""
    from tilewright.quantize.crossquant import _claim_exact
    from tilewright.quantize.crossquant._claim_model import Bench

    yield from _claim_exact.identity_rows(experiment)
    yield _claim_exact.gradient_row()
    yield from _claim_exact.digit_rows(experiment)
    yield from _claim_exact.speed_rows(experiment)
    experiment.say("loading the model")
    bench = Bench(experiment.quick)
    experiment.say("calibrating")
    seen = [bench.calibrate(i) for i in range(len(bench.batches))]
    yield capture_row(experiment, bench)
    yield from kernel_rows(experiment, bench, seen[0])
    yield from dynamic_rows(experiment, bench)
    yield from integer_rows(experiment, bench, seen)
    yield from mechanism_rows(experiment, bench)
    yield from planted_rows(experiment, bench)


def capture_row(experiment: Experiment, bench: Bench) -> Row:
    """What running column maxima of all linears cost over the bare forward pass; judged in the full form only."""
    import torch

    from tilewright.capture import observe
    from tilewright.quantize.crossquant._claim_exact import fastest
    from tilewright.quantize.crossquant._claim_model import LINEARS
    from tilewright.reducers import AbsMax

    batch = bench.batches[0][0]

    def bare() -> None:
        with torch.no_grad():
            bench.module(batch)

    def watch() -> None:
        observe(bench.module, [batch], {LINEARS: AbsMax})

    alone, watched = fastest(bare, watch, repeats=1 if experiment.quick else 5)
    name = f"column maxima of {len(bench.linears)} inputs over the bare forward pass, time"
    return experiment.in_full(at_most(name, watched / alone, 1.1))


def kernel_rows(experiment: Experiment, bench: Bench, seen: dict[str, Any]) -> Iterator[Row]:
    """Item 2: share of activations rounded to zero, mean over all linears."""
    from tilewright.quantize.crossquant.scales import crossquant_scale, per_token_scale, quantization_kernel_proportion

    experiment.say("kernel proportions")

    def measure(name: str, x: Tensor) -> dict[str, float]:
        c = seen[name].col_absmax
        found = {"exact zeros": float((x == 0).double().mean())}
        for bits in BITS:
            for form, step in (
                ("per token", per_token_scale(x, bits)),
                ("dynamic", crossquant_scale(x, bits)),
                ("tight", crossquant_scale(x, bits, col_absmax=c, mode="tight")),
            ):
                found[f"{form}, A{bits}"] = quantization_kernel_proportion(x, step).all
        return found

    layers = bench.mean_over_linears(measure)
    mean = {key: sum(values) / len(values) for key, values in layers.items()}
    experiment.values["kernel"] = mean
    experiment.values["kernel_by_layer"] = {k: layers[k] for k in ("per token, A8", "dynamic, A8", "tight, A8")}
    count = len(layers["exact zeros"])
    yield Row(f"exact zeros of X, mean of {count} linears", "", mean["exact zeros"], "reported", True)
    yield Row("kernel proportion, A8, per token", "> 1 % (LLaMA)", mean["per token, A8"], "reported", True)
    yield Row("kernel proportion, A8, dynamic", "< 0.1 % (LLaMA)", mean["dynamic, A8"], "reported", True)
    for bits in BITS:
        token = mean[f"per token, A{bits}"]
        yield at_most(f"kernel, A{bits}: dynamic over per token", mean[f"dynamic, A{bits}"] / token, 0.45)
        yield at_most(f"kernel, A{bits}: tight over per token", mean[f"tight, A{bits}"] / token, 0.5)


def dynamic_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 3, simulated: per token and dynamic CrossQuant, weights INT8 per output channel."""
    from tilewright.quantize.crossquant.scales import fake_crossquant

    experiment.say("perplexity, simulated")
    found: dict[str, float] = {"float": bench.perplexity()}
    with bench.rounded_weights():
        for bits in BITS:
            found[f"per token, A{bits}"] = bench.simulated(lambda x: fake_crossquant(x, bits, 1.0))  # noqa: B023
            found[f"dynamic, A{bits}"] = bench.simulated(lambda x: fake_crossquant(x, bits))  # noqa: B023
    experiment.values["perplexity"] = found
    exact = found["float"]
    yield Row(f"perplexity in float32, {bench.tokens} tokens", "", exact, "reported", True)
    yield at_least("W8A6: per token over float32", found["per token, A6"] / exact, 1.25)
    yield experiment.in_full(at_most("W8A6: dynamic over float32", found["dynamic, A6"] / exact, 1.05))
    yield experiment.in_full(at_most("W8A8: dynamic over float32", found["dynamic, A8"] / exact, 1.01))
    yield at_most("W8A4: dynamic over per token", found["dynamic, A4"] / found["per token, A4"], 1 / 20)


def integer_rows(experiment: Experiment, bench: Bench, seen: list[dict[str, Any]]) -> Iterator[Row]:
    """Items 3 and 6, deployed: folded, weights rounded after folding, INT8 products."""
    from tilewright.quantize.crossquant.config import CrossQuantConfig
    from tilewright.quantize.crossquant.smoothquant import smoothquant_choice

    experiment.say("perplexity, integer layers")
    found: dict[str, float] = experiment.values["perplexity"]
    exact = found["float"]
    for i, one in enumerate(seen):
        found[f"tight, A6, calibration {i}"] = bench.integer(CrossQuantConfig(a_bits=6), one)
    found["tight, A6"] = max(found[f"tight, A6, calibration {i}"] for i in range(len(seen)))
    found["tight, A8"] = bench.integer(CrossQuantConfig(), seen[0])
    found["SmoothQuant 0.5, A6"] = bench.integer(CrossQuantConfig(a_bits=6), seen[0], smoothquant_choice())
    name = "folded tight, alpha 0.15, over float32"
    yield experiment.in_full(at_most(f"W8A6: {name}, worst calibration", found["tight, A6"] / exact, 1.12))
    yield experiment.in_full(at_most(f"W8A8: {name}", found["tight, A8"] / exact, 1.03))
    ratio = found["tight, A6, calibration 0"] / found["SmoothQuant 0.5, A6"]
    yield experiment.in_full(at_most("W8A6: tight, alpha 0.15, over SmoothQuant 0.5", ratio, 1.0))
    if experiment.quick:
        return
    experiment.say("searched exponents")
    for bits in (8, 6):
        config = CrossQuantConfig(a_bits=bits, alpha="search")
        found[f"tight searched, A{bits}"] = bench.integer(config, seen[0])
        tuned = smoothquant_choice(MIGRATIONS)
        found[f"SmoothQuant searched, A{bits}"] = bench.integer(config, seen[0], tuned)
    found["SmoothQuant 0.5, A8"] = bench.integer(CrossQuantConfig(), seen[0], smoothquant_choice())
    found["static, A6"] = bench.integer(CrossQuantConfig(a_bits=6, mode="static"), seen[0])
    found["tight, A4"] = bench.integer(CrossQuantConfig(a_bits=4), seen[0])
    found["static, A4"] = bench.integer(CrossQuantConfig(a_bits=4, mode="static"), seen[0])
    yield at_most("W8A8: folded tight, searched alpha, over float32", found["tight searched, A8"] / exact, 1.015)
    ratio = found["tight searched, A8"] / found["SmoothQuant 0.5, A8"]
    yield at_most("W8A8: searched tight over SmoothQuant 0.5", ratio, 1.01)
    for bits in (8, 6):
        ratio = found[f"tight searched, A{bits}"] / found[f"SmoothQuant searched, A{bits}"]
        yield at_most(f"W8A{bits}: searched tight over SmoothQuant with searched migration", ratio, 1.01)
    for form in ("static, A6", "tight, A4", "static, A4"):
        yield Row(f"W8: {form}, over float32", "", found[form] / exact, "reported", True)


def mechanism_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 4, reported: how much of the per-token loss at A6 is the kernel's, weights in float32."""
    import torch

    from tilewright.quantize.crossquant.scales import fake_quantize_with, in_kernel, per_token_scale

    if experiment.quick:
        return
    experiment.say("mechanism")

    def removed(x: Tensor) -> Tensor:
        return torch.where(in_kernel(x, per_token_scale(x, 6)), torch.zeros_like(x), x)

    def outside(x: Tensor) -> Tensor:
        step = per_token_scale(x, 6)
        return torch.where(in_kernel(x, step), x, fake_quantize_with(x, step))

    def both(x: Tensor) -> Tensor:
        return fake_quantize_with(x, per_token_scale(x, 6))

    tokens = bench.tokens // 2
    exact = bench.perplexity(tokens=tokens)
    found = {name: bench.simulated(f, tokens) for name, f in (("all", both), ("kernel", removed), ("rest", outside))}
    experiment.values["mechanism"] = {"float": exact} | found
    lost = found["all"] - exact
    for name, what in (("kernel", "only the kernel set to zero"), ("rest", "only the rest rounded")):
        share = (found[name] - exact) / lost
        yield Row(f"A6 per token, {what}: share of the loss", "all of it in the kernel", share, "reported", True)


def planted_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 5: outliers planted in the inputs of attention and MLP, the function unchanged."""
    import torch

    from tilewright.quantize.crossquant.config import CrossQuantConfig
    from tilewright.quantize.crossquant.scales import (
        crossquant_scale,
        fake_crossquant,
        per_token_scale,
        quantization_kernel_proportion,
    )

    tokens = bench.window
    exact = bench.perplexity(tokens=tokens)
    probe = bench.text[None, :64]
    found: list[dict[str, float]] = []
    for seed in PLANT_SEEDS[: 1 if experiment.quick else None]:
        experiment.say(f"planted outliers, seed {seed}")
        hard = bench.planted(seed)
        with torch.no_grad():
            change = float((hard(probe).logits - bench.module(probe).logits).abs().max())
        seen = bench.calibrate(module=hard)

        def measure(name: str, x: Tensor) -> dict[str, float]:
            step = crossquant_scale(x, 8, col_absmax=seen[name].col_absmax, mode="tight")  # noqa: B023
            return {
                "per token": quantization_kernel_proportion(x, per_token_scale(x)).all,
                "tight": quantization_kernel_proportion(x, step).all,
            }

        kernel = {key: sum(values) / len(values) for key, values in bench.mean_over_linears(measure, hard).items()}
        with bench.rounded_weights(hard):
            plain = bench.simulated(lambda x: fake_crossquant(x, 8, 1.0), tokens, hard)
        tight = bench.integer(CrossQuantConfig(), seen, module=hard, tokens=tokens)
        found.append({"logits": change, "per token": plain / exact, "tight": tight / exact,
                      "per token kernel": kernel["per token"], "tight kernel": kernel["tight"]})  # fmt: skip
    experiment.values["planted"] = found

    def worst(key: str, largest: bool = True) -> float:
        values = [one[key] for one in found]
        return max(values) if largest else min(values)

    yield at_most("planted outliers: largest change of a float32 logit", worst("logits"), 1e-4, paper="0")
    yield at_least("planted, W8A8 per token over float32", worst("per token", False), 1.3)
    yield at_least("planted, kernel proportion per token", worst("per token kernel", False), 0.2)
    yield at_most("planted, W8A8 folded tight over float32", worst("tight"), 1.06)
    yield at_most("planted, kernel proportion tight", worst("tight kernel"), 0.05)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: kernel proportion by layer at A8. Middle: its mean by bits. Right: perplexity by bits."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1.3))
    for name, shares in values["kernel_by_layer"].items():
        left.plot([100 * share for share in shares], label=name.removesuffix(", A8"), linewidth=0.9)
    left.set_xlabel("linear, in order")
    left.set_ylabel("activations rounded to zero, %")
    left.set_title("quantization kernel, A8")
    left.legend(fontsize=8)
    for form in ("per token", "dynamic", "tight"):
        middle.plot([f"A{b}" for b in BITS], [100 * values["kernel"][f"{form}, A{b}"] for b in BITS], "o-", label=form)
    middle.set_title("mean over linears, %")
    found = values["perplexity"]
    for form in ("per token", "dynamic", "tight", "SmoothQuant 0.5"):
        bits = [b for b in BITS if f"{form}, A{b}" in found]
        right.plot([f"A{b}" for b in bits], [found[f"{form}, A{b}"] for b in bits], "o-", label=form)
    right.axhline(found["float"], color="black", linewidth=0.7)
    right.set_yscale("log")
    right.set_title("perplexity, INT8 weights")
    right.legend(fontsize=8)


CLAIM = Claim(
    "crossquant",
    "Row-and-column activation scales round fewer activations to zero, and fold into integer products",
    "CrossQuant, arXiv 2410.07505",
    run,
    plot,
)
