# SPDX-License-Identifier: Apache-2.0
"""The claims of the linear-attention family: their checks hold, and fail when what they check is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="hybrid stacks are transformers models")

from tilewright import claims, ops
from tilewright.claims import Experiment
from tilewright.data.recall import BLANK, IGNORE, multi_query_recall
from tilewright.nn.delta_rule import _claim_exact, _claim_tasks, _claim_tools
from tilewright.nn.hybrid_linear_attention import _claim_cost
from tilewright.nn.hybrid_linear_attention import _claim_exact as hybrid_exact
from tilewright.nn.hybrid_linear_attention import claim as hybrid_claim
from tilewright.nn.lightning_attention import _claim_exact as lightning_exact
from tilewright.nn.lightning_attention import claim as lightning_claim

QUICK = Experiment(quick=True)
CHECKS = {
    "overwrite": _claim_exact.overwrite_rows,
    "segments": _claim_exact.split_rows,
    "lightning": lightning_exact.definition_rows,
    "relatives": lightning_exact.relative_rows,
    "distance": hybrid_claim.distance_rows,
    "loops": hybrid_exact.loop_rows,
    "models": hybrid_exact.model_rows,
    "counting": _claim_cost.counting_rows,
    "cache": _claim_cost.memory_rows,
}


def test_all_three_are_found():
    found = claims.discover()
    assert {"delta-rule", "lightning-attention", "hybrid-linear-attention"} <= found.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_holds(name):
    rows = list(CHECKS[name](Experiment(quick=True)))
    assert rows
    assert not [row for row in rows if not row.holds]


def scaled(function):
    """The operator with outputs off by one in a thousand."""

    def wrong(*arguments, **options):
        o, state = function(*arguments, **options)
        return 1.001 * o, state

    return wrong


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("overwrite", "linear_attention"),
        ("segments", "state_transition"),
        ("lightning", "lightning_attn_func"),
        ("relatives", "chunk_retention"),
        ("distance", "chunk_retention"),
        ("loops", "chunk_gla"),
    ],
)
def test_a_check_fails_when_its_operator_is_wrong(monkeypatch, check, broken):
    monkeypatch.setattr(ops, broken, scaled(getattr(ops, broken)))
    assert [row for row in CHECKS[check](Experiment(quick=True)) if not row.holds]


def test_the_definition_is_the_reference():
    from tilewright.reference.linear_attention import recurrence

    for rule in _claim_exact.RULES:
        inputs = _claim_exact.draw(rule, 2, 20, 2, 4, 3, 5)
        got, want = _claim_exact.recurrence(**inputs), recurrence(**inputs, rule="delta")
        assert all(_claim_tools.relative(a, b) < 1e-14 for a, b in zip(got, want, strict=True))


def test_draws_that_forget_have_sudden_resets():
    g = _claim_exact.draw("kda", 1, 200, 2, 2, 4, 4, decay=float("inf"))["g"]
    share = float((g == -50).double().mean())
    assert 0.1 < share < 0.3


def test_the_last_value_written_counts():
    inputs, labels = _claim_tasks.rewritten_recall(4, 0)
    for row, asked in zip(inputs.tolist(), labels.tolist(), strict=True):
        held = dict(zip(row[0:48:2], row[1:48:2], strict=True))
        assert len(held) == 8
        assert all(key < 32 <= value for key, value in held.items())
        assert [held[row[t]] for t in range(64) if asked[t] != IGNORE] == [a for a in asked if a != IGNORE]
        assert sum(a != IGNORE for a in asked) == 8
        assert all(row[t] == BLANK for t in range(48, 64) if asked[t] == IGNORE)


def test_without_erasing_is_the_sum_of_gated_values():
    torch.manual_seed(0)
    adds = _claim_tasks.WithoutErasing(16, 2)
    erases = _claim_tasks.DeltaNet(16, 2)
    erases.load_state_dict(adds.state_dict())
    x = torch.randn(1, 6, 16)
    # The first token finds an empty state, so there is nothing to erase.
    assert torch.allclose(adds(x)[0][:, 0], erases(x)[0][:, 0], atol=1e-6)
    assert not torch.allclose(adds(x)[0][:, 5], erases(x)[0][:, 5], atol=1e-3)


def test_tuning_takes_the_best_rate_and_keeps_its_seeds(monkeypatch):
    scores = {1e-3: 0.2, 1e-2: 0.9}

    def pretend(run):
        return {"rate": run.rate, "seed": run.seed, "by_position": [0.0, scores[run.rate]]}

    monkeypatch.setattr(_claim_tasks, "execute", pretend)
    contest = _claim_tasks.CONTESTS["mqar"]
    found = _claim_tasks.tuned(contest.runs((1e-3, 1e-2)), 3, workers=1)
    assert {name: [(o["rate"], o["seed"]) for o in outcomes] for name, outcomes in found.items()} == {
        name: [(1e-2, 0), (1e-2, 1), (1e-2, 2)] for name in (contest.first, contest.second, contest.beside)
    }
    assert _claim_tasks.score(found[contest.first][0], 1) == 0.9


def test_accuracy_counts_asked_positions_only():
    class Knows(nn.Module):
        def forward(self, tokens):
            return nn.functional.one_hot(torch.full_like(tokens, 40), 64).float()

    def task(batch, seed, **_):
        inputs, labels = multi_query_recall(batch, seed)
        labels[labels != IGNORE] = 40
        labels[0][labels[0] != IGNORE] = 41
        return inputs, labels

    from tilewright.data.recall import Stream

    share = _claim_tasks.accuracy(Knows(), Stream(task, 4), 2)
    outcome = {"by_position": share.tolist()}
    asked = sum((multi_query_recall(4, 0)[1] != IGNORE).sum(1).tolist()) / 4
    assert asked == 8
    assert 0.4 < _claim_tasks.score(outcome) < 1.0


@pytest.mark.parametrize("claim", ["delta-rule", "lightning-attention", "hybrid-linear-attention"])
def test_plots_draw_made_up_values(claim):
    from matplotlib.figure import Figure

    curve = [(50, 0.1), (100, 0.9)]
    outcome = {"curve": curve, "by_position": [0.5, 0.9]}
    groups = [
        {"mixer": mixer, "ratio": ratio, "scores": [0.5, 0.6]}
        for mixer, ratio in (("gla", "pure"), ("gla", "3:1"), ("softmax", "full"))
    ]
    study = {"study": {"ratios": ["pure", "3:1", "full"], "mixers": ["gla"]}, "groups": groups}
    values = {
        "delta-rule": {
            "learning": {"mqar: DeltaNet": [outcome], "parity: beta in (0, 2)": [outcome]},
            "memory": {"chunk": {"numbers per token and head": 3.0}},
        },
        "lightning-attention": {
            "seconds per token": {"forward": {512: 1e-6}, "softmax": {512: 2e-6}},
            "bytes": {"curves": {"lightning": [[3.0, 2.0]], "softmax": [[3.0, 2.1]]}},
        },
        "hybrid-linear-attention": {
            "recall": study,
            "text": study,
            "recall by distance": {"gla": [{"4": 0.9, "12": 0.5}]},
        },
    }[claim]
    figure = Figure()
    claims.find(claim).plot(values, figure)
    assert figure.axes
    if claim == "delta-rule":
        del values["learning"]["parity: beta in (0, 2)"]
        claims.find(claim).plot(values, Figure())


def test_memory_is_measured_in_a_process_of_its_own():
    from tilewright.nn.delta_rule._claim_memory import peak_growth

    size = 4 * 4096 * 4 * 64
    assert peak_growth("forward_of_lightning", tokens=4096, heads=4, size=64) > 0.9 * size
    with pytest.raises(RuntimeError, match="failed: KeyError"):
        peak_growth("no such work")


def test_blocks_of_the_layer_are_the_layer():
    torch.manual_seed(0)
    layer = lightning_exact.LightningAttention(16, 2, layer_idx=0, num_layers=2)
    blocked = lightning_exact.BlockedLightning(16, 2, block=5, layer_idx=0, num_layers=2)
    blocked.load_state_dict(layer.state_dict())
    x = torch.randn(2, 13, 16)
    assert torch.allclose(layer(x)[0], blocked(x)[0], atol=1e-6)
    assert lightning_claim.BLOCKS == (16, 64, 256)


def test_contests_of_recall_give_every_mixer_one_state():
    contest = _claim_tasks.CONTESTS["mqar"]
    mixers = [_claim_tasks.MIXERS[name](contest.run.heads.options()) for name in contest.runs()]
    assert len(mixers) == 3
    assert {(m.head_k_dim, m.head_v_dim, m.num_heads) for m in mixers} == {(24, 4, 1)}


def test_recall_of_hedgehog_has_more_keys_than_features_of_elu():
    from tilewright.linearize.hedgehog import _claim_small

    model = _claim_small.Recall("elu", 64)
    tokens, _ = multi_query_recall(2, 0, length=12, pairs=4)
    assert model(tokens).shape == (2, 12, 64)
    attention = model.blocks[0].attention
    assert _claim_small.HEADS * attention.phi_k.feature_size < 64 // 2 - 1
    assert (
        _claim_small.Recall("hedgehog", 64).blocks[0].attention.phi_k.feature_size == 2 * _claim_small.RECALL_SIZES[0]
    )


def test_recall_of_mixtures_has_one_state_to_compare_with():
    from tilewright.nn.mom import _claim_train

    task = _claim_train.RECALL
    mixture = (_claim_train.MEMORIES + 1) * task.head_dim * task.head_dim * task.expand_v
    assert mixture == task.head_dim * task.head_dim * task.single_expand_v
    inputs, labels = _claim_train.recipe(task).held_out(1, 3)[0]
    assert inputs.shape == (3, 2 * task.pairs)
    assert ((labels != IGNORE).sum(1) == task.pairs).all()
