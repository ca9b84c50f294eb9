# SPDX-License-Identifier: Apache-2.0
"""What GenBaB promises, at small scale (docs/methods/genbab.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Relaxations, split tables, bounds, exact minima, digits, a power network, what is no proof, files."""
    from tilewright.verify.genbab import _claim_digits, _claim_exact, _claim_power

    yield from _claim_exact.relaxation_rows(experiment)
    yield from _claim_exact.table_rows(experiment)
    yield from _claim_exact.bound_rows(experiment)
    yield from _claim_exact.milp_rows(experiment)
    yield from _claim_digits.rows(experiment)
    yield from _claim_power.rows(experiment)
    yield from _claim_exact.closed_rows(experiment)
    yield from _claim_exact.file_rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Images proved by each way; proved images over subdomains; widths by kind of graph; the power network."""
    axes = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    _proved(values["digits"], axes[0])
    _growth(values["digits"], axes[1])
    _power(values["power"], axes[2])


WAYS = {
    "alone": "alpha-CROWN alone",
    "BaBSR-like, midpoints": "BaBSR-like, midpoints",
    "BBPS, best points": "BBPS, best points",
}
COLOURS = ("0.75", "tab:orange", "tab:blue")


def _proved(nets: list[dict[str, Any]], axis: Any) -> None:
    names = list(dict.fromkeys(net["activation"] for net in nets))
    for i, (key, label) in enumerate(WAYS.items()):
        heights = [sum(net[key] for net in nets if net["activation"] == name) for name in names]
        axis.bar([j + 0.27 * (i - 1) for j in range(len(names))], heights, 0.25, color=COLOURS[i], label=label)
    images = [sum(net["images"] - net["broken"] for net in nets if net["activation"] == name) for name in names]
    axis.scatter(range(len(names)), images, marker="_", s=900, color="k", label="not broken by the attack")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1.45 * max(images))
    axis.set_ylabel("images proved robust")
    axis.set_title("digits, 64-50-50-50-10", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="upper left", markerscale=0.4)


def _growth(nets: list[dict[str, Any]], axis: Any) -> None:
    for i, way in enumerate(("BaBSR-like, midpoints", "BBPS, best points"), 1):
        counts = sorted(d for net in nets for d in net["proved at"][way])
        axis.step([max(d, 1) for d in counts], range(1, len(counts) + 1), where="post", color=COLOURS[i], label=way)
    axis.set_xscale("log")
    axis.set_xlabel("subdomains an image")
    axis.set_ylabel("images proved, all nets")
    axis.set_title("the harder images take more", fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def _power(found: list[dict[str, float]], axis: Any) -> None:
    keys = ("alpha-CROWN", "ReLU only", "all", "samples")
    colours = ("0.75", "tab:orange", "tab:blue", "k")
    for j, one in enumerate(found):
        for i, key in enumerate(keys):
            axis.bar(j + 0.2 * (i - 1.5), one[key], 0.18, color=colours[i], label=key if j == 0 else None)
    axis.set_xticks(range(len(found)), [f"net {j}" for j in range(len(found))])
    axis.set_ylim(0, 1.4 * max(one["alpha-CROWN"] for one in found))
    axis.set_ylabel("largest imbalance, per unit")
    axis.set_title("AC power balance", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="upper left", title="branching on", title_fontsize=7)


CLAIM = Claim(
    "genbab",
    "Branching on any nonlinearity proves more than bounds alone, and never what is false",
    "GenBaB, arXiv 2405.21063",
    run,
    plot,
)
