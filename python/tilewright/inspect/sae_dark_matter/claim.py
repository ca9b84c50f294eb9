# SPDX-License-Identifier: Apache-2.0
"""What the dark-matter paper promises, on SmolLM2-135M-Instruct's layer 16 (docs/methods/sae-dark-matter.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Planted features, the scaling fit, then on the real model the decomposition and all that follows from it."""
    from tilewright.inspect.sae_dark_matter import _claim_exact
    from tilewright.inspect.sae_dark_matter._claim_model import bench
    from tilewright.inspect.sae_dark_matter._claim_real import Real

    yield from _claim_exact.planted_rows(experiment)
    yield from _claim_exact.scaling_rows(experiment)
    experiment.say("activations of the model")
    with bench(experiment.quick) as some:
        yield from Real(experiment, some).rows()


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: the error by width in its two parts. Middle: predictability of squared norms. Right: the simulation."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.5, 1.3))
    _parts(values, left)
    _norms(values, middle)
    levels, simulation = values["simulation"]["levels"], values["simulation"]
    for i, level in enumerate(levels):
        shade = str(0.75 - 0.15 * i)
        right.plot(levels, simulation["nonlinear"][i], color=shade, label=f"{level:g}")
    right.legend(title="dense noise", fontsize=7, title_fontsize=7)
    right.set_xlabel("introduced noise")
    right.set_title("nonlinear estimate, FVU", fontsize=9)


def _parts(values: dict[str, Any], axes: Axes) -> None:
    widths: dict[int, list[dict[str, float]]] = {}
    for name, one in values["saes"].items():
        widths.setdefault(int(name.split(",")[0]), []).append(one["fvu"])
    order = sorted(widths)
    nonlinear = [sum(f["nonlinear"] for f in widths[w]) / len(widths[w]) for w in order]
    total = [sum(f["sae"] for f in widths[w]) / len(widths[w]) for w in order]
    axes.fill_between(order, 0, nonlinear, color="tab:red", alpha=0.5, label="nonlinear")
    axes.fill_between(order, nonlinear, total, color="tab:blue", alpha=0.5, label="linear")
    for w in order:
        axes.plot([w] * len(widths[w]), [f["sae"] for f in widths[w]], "k.", markersize=4)
        axes.plot([w] * len(widths[w]), [f["nonlinear"] for f in widths[w]], "k.", markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(order, [str(w) for w in order], fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(total))
    axes.set_xlabel("latents")
    axes.set_title("variance unexplained", fontsize=9)
    axes.legend(fontsize=8, loc="lower left")


def _norms(values: dict[str, Any], axes: Axes) -> None:
    first, *_ = values["saes"].values()
    names = [*first["norms"], *first["baselines"]]
    for i, (name, one) in enumerate(values["saes"].items()):
        shares = [max(v, 0.0) for v in (*one["norms"].values(), *one["baselines"].values())]
        axes.barh(
            [j + 0.8 * i / len(values["saes"]) for j in range(len(names))],
            shares,
            0.8 / len(values["saes"]),
            label=name,
        )
    axes.set_yticks(
        [j + 0.3 for j in range(len(names))], [*first["norms"], *(f"error, from {b}" for b in first["baselines"])]
    )
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set_title("squared norm from x: R² (no bar: below 0)", fontsize=9)
    axes.legend(fontsize=6)


CLAIM = Claim(
    "sae-dark-matter",
    "Much of an SAE's error is linear in the activation, and what is not does not shrink with the width",
    "Decomposing the dark matter of sparse autoencoders, arXiv 2410.14670",
    run,
    plot,
)
