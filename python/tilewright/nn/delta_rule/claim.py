# SPDX-License-Identifier: Apache-2.0
"""What the delta rule promises: an exact parallel form, overwriting instead of adding, negative eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Exactness, transformers, memory, segments, overwriting, learning."""
    from tilewright.nn.delta_rule import _claim_exact, _claim_tasks

    yield from _claim_exact.definition_rows(experiment)
    yield from _claim_exact.oracle_rows(experiment)
    yield from memory_rows(experiment)
    yield from _claim_exact.split_rows(experiment)
    yield from _claim_exact.overwrite_rows(experiment)
    yield from _claim_tasks.learning_rows(experiment)


def memory_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 4: peak memory of forward and backward of the chunked form against autograd through the recurrence.

    Growth by doubling T takes out what does not depend on T, so the slope is numbers per token and head, inputs not
    counted. Output, its gradient and those of q, k, v, beta are 2 K + 3 V + 1 numbers; the bound allows 4 (K + V) and a
    state for every 64 tokens, K V / 64. The recurrence keeps states for every token.
    """
    from tilewright.nn.delta_rule._claim_memory import peak_growth

    experiment.say("peak memory of the backward pass")
    heads, size = 4, 64
    lengths = {"chunk": (4096, 8192), "autograd": (512, 1024) if experiment.quick else (2048, 4096)}
    found: dict[str, Any] = {}
    for method, pair in lengths.items():
        peaks = [peak_growth("backward_of_delta_rule", method=method, tokens=t, heads=heads, size=size) for t in pair]
        slope = (peaks[1] - peaks[0]) / (pair[1] - pair[0]) / heads / 4
        found[method] = {"tokens": pair, "bytes": peaks, "numbers per token and head": slope}
    experiment.values["memory"] = found
    chunk, autograd = (found[method]["numbers per token and head"] for method in lengths)
    bound = 4 * (size + size) + size * size / 64
    yield at_most("backward: numbers kept per token and head, K = V = 64", chunk, bound, paper="O(K + V)")
    yield at_least("autograd through the recurrence keeps, of states K V a token", autograd / size**2, 1.0)
    yield at_least("autograd over chunked, memory per token", autograd / chunk, 4.0)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: accuracy while training, recall. Right: parity by position, and memory of the backward pass."""
    learning = values["learning"]
    left, right = figure.subplots(1, 2)
    for name, outcomes in learning.items():
        if name.startswith("parity"):
            continue
        for i, outcome in enumerate(outcomes):
            steps, shares = zip(*outcome["curve"], strict=True)
            style = "-" if "DeltaNet" in name else "--"
            color = f"C{list(learning).index(name)}"
            left.plot(steps, shares, style, color=color, label=name if i == 0 else None, alpha=0.8)
    left.set_xlabel("training step")
    left.set_ylabel("accuracy on new sequences")
    left.set_title("associative recall")
    left.legend(fontsize=7)
    parity = {name: outcomes for name, outcomes in learning.items() if name.startswith("parity")}
    if parity:
        for name, outcomes in parity.items():
            right.plot(outcomes[0]["by_position"], label=name)
        right.axhline(0.5, color="gray", linestyle=":")
        right.set_xlabel("position")
        right.set_ylabel("accuracy")
        right.set_title("running parity")
    else:
        found = values["memory"]
        right.bar(list(found), [entry["numbers per token and head"] for entry in found.values()])
        right.set_yscale("log")
        right.set_ylabel("numbers kept per token and head")
        right.set_title("memory of the backward pass")
    if parity:
        right.legend(fontsize=7)


CLAIM = Claim(
    "delta-rule",
    "The delta rule: exact in chunks, overwrites what it stored, tracks parity with negative eigenvalues",
    "DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464; Kimi Linear, arXiv 2510.26692",
    run,
    plot,
)
