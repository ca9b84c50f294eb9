# SPDX-License-Identifier: Apache-2.0
"""What Hedgehog promises, on matrices, SmolLM2-135M-Instruct, digits and recall (docs/methods/hedgehog.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Exactness, maps, decoding, small models, then the real one."""
    from tilewright.linearize.hedgehog import _claim_exact, _claim_model, _claim_small

    yield from _claim_exact.exact_rows(experiment)
    yield from _claim_exact.map_rows(experiment)
    yield from _claim_model.decode_rows(experiment)
    yield from _claim_small.digits_rows(experiment)
    yield from _claim_small.recall_rows(experiment)
    experiment.say("loading the model")
    bench = _claim_model.Bench(experiment.quick)
    yield from _claim_model.layer_rows(experiment, bench)
    yield from _claim_model.conversion_rows(experiment, bench)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """KL of every map in every layer; perplexity of every conversion."""
    left, right = figure.subplots(1, 2)
    layers = values["layers"]
    names = ["softmax_dim", "exp_dim", "identity", "ReLU", "1+ELU", "Performer"]
    names = [name for name in names if all(name in scores for scores in layers.values())]
    for place, name in enumerate(names):
        kls = [_mean(scores[name], "kl") for scores in layers.values()]
        spots = [x + 0.8 * (place + 0.5) / len(names) - 0.4 for x in range(len(layers))]
        left.bar(spots, kls, 0.8 / len(names), label=name)
    left.set_xticks(range(len(layers)), [f"layer {name}" for name in layers])
    left.set_ylabel("KL from softmax, held out (nats)")
    left.set_ylim(top=1.5 * left.get_ylim()[1])
    left.legend(fontsize="small", ncols=2, loc="upper left")
    perplexity = values["perplexity"]
    right.barh(list(perplexity), list(perplexity.values()))
    right.set_xscale("log")
    right.invert_yaxis()
    right.set_xlabel("perplexity, held out")


def _mean(scores: Any, key: str) -> float:
    some = scores if isinstance(scores, list) else [scores]
    return sum(s[key] for s in some) / len(some)


CLAIM = Claim(
    slug="hedgehog",
    title="Learned feature maps imitate softmax attention and convert a pretrained model to linear time",
    source="arXiv 2402.04347; window: arXiv 2410.10254",
    run=run,
    plot=plot,
)
