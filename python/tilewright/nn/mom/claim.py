# SPDX-License-Identifier: Apache-2.0
"""What a mixture of memories promises: exactness, isolation, capacity, linear time (docs/methods/mom.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Packed form, one memory, decoding, isolation, time, recall, language."""
    from tilewright.nn.mom import _claim_exact, _claim_train

    yield from _claim_exact.packed_rows(experiment)
    yield from _claim_exact.single_rows(experiment)
    yield from _claim_exact.decode_rows(experiment)
    yield from _claim_exact.isolation_rows(experiment)
    yield from _claim_exact.time_rows(experiment)
    yield from _claim_train.recall_rows(experiment)
    yield from _claim_train.language_rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Accuracy of recall by seed; loss of the byte model by position; time a token by length."""
    left, middle, right = figure.subplots(1, 3)
    accuracy = values.get("recall", {}).get("accuracy", {})
    for place, seeds in enumerate(accuracy.values()):
        left.bar(place, sum(seeds) / len(seeds), color=f"C{place}", alpha=0.5)
        left.plot([place] * len(seeds), seeds, "o", color=f"C{place}")
    left.set_xticks(range(len(accuracy)), [name.replace(", ", ",\n") for name in accuracy], rotation=90, fontsize=8)
    left.set_ylim(0, 1)
    left.set_title("accuracy of recall")
    for name, losses in values["language"]["by position"].items():
        middle.plot([(i + 0.5) / len(losses) for i in range(len(losses))], losses, marker="o", label=name)
    middle.set_xlabel("position / window")
    middle.set_title("byte model, loss in nats")
    middle.legend()
    times = values["microseconds a token"]
    for name in ("mixture", "single"):
        right.plot(times["length"], times[name], marker="o", label=name)
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("T")
    right.set_title("µs a token, both passes")
    right.legend()


CLAIM = Claim(
    "mom",
    "Several memories and a router hold more than one memory of the same size, at linear cost",
    "MoM, arXiv 2502.13685",
    run,
    plot,
)
