# SPDX-License-Identifier: Apache-2.0
"""Passes with neurons dropped, the metrics, and the searches for perplexity and for a ratio."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sparsing_law_models import NEURONS, VOCABULARY, learned, tiny
from sparsing_law_models import text as random_text
from torch import nn

from tilewright.sparsify.sparsing_law import (
    FeedForward,
    Measurement,
    apply_thresholds,
    cett_ppl,
    cett_thresholds,
    export_thresholds,
    feed_forwards,
    joint_cett_ppl,
    pareto,
    sparsity,
)
from tilewright.sparsify.sparsing_law.measurement import token_losses
from tilewright.sparsify.sparsing_law.search import match_perplexity
from tilewright.sparsify.thresholds import load_thresholds

KINDS = ("silu", "relu", "plain")
ARGS = {"cett": 0.2, "cats": 0.4, "topk": 0.4, "fat": 0.3}


def hidden(model, x):
    """h of the first block, by its own layers."""
    block, x = model.layers[0], model.embed(x)
    if hasattr(block, "fc2"):
        return block.act(block.fc1(x)), block.fc2
    return block.act_fn(block.gate_proj(x)) * block.up_proj(x), block.down_proj


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_that_of_the_neurons_shorter_than_eps(kind):
    model, x = tiny(kind, layers=1), random_text()
    eps = cett_thresholds(model, [x], 0.3)
    h, down = hidden(model, x)
    norms = down.weight.norm(dim=0)
    (bound,) = eps.values()
    kept = h * (h.abs() * norms >= bound)
    wanted = model.head(model.embed(x) + F.linear(kept, down.weight, down.bias))
    before = model(x)
    with apply_thresholds(model, eps):
        torch.testing.assert_close(model(x), wanted)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_counts_active_neurons_of_the_sparse_model(kind):
    model, x = tiny(kind), random_text()
    report = sparsity(model, [x], "cett", 0.2)
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in ("down_proj", "fc2")
    ]
    with apply_thresholds(model, report.eps):
        model(x)
    for handle in handles:
        handle.remove()
    # The spying hooks were registered first, so they see h before it is truncated.
    ratios, frequencies = [], []
    for (name, h), eps in zip(seen.items(), report.eps.values(), strict=True):
        active = h.abs() * model.get_submodule(name).weight.norm(dim=0) >= eps
        ratios.append(float(active.double().mean()))
        frequencies.append(active.double().mean((0, 1)))
    assert list(report.per_layer.values()) == pytest.approx(ratios, abs=1e-12)
    assert report.activation_ratio == pytest.approx(sum(ratios) / 2, abs=1e-12)
    torch.testing.assert_close(list(report.frequency.values()), frequencies)
    assert float(report.token_ratio.mean()) == pytest.approx(report.activation_ratio, abs=1e-12)
    assert report.tokens == x.numel()
    assert 0 < report.sparsity < 1


def test_losses_are_those_of_shifted_labels():
    model, x = tiny(), random_text()
    wanted = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_losses(model, x), wanted.double())
    dense = sparsity(model, [x], "cett", 0.0)
    assert dense.ppl_dense == pytest.approx(math.exp(float(wanted.double().mean())), rel=1e-12)
    assert dense.ppl_ratio == 1.0
    assert dense.stderr == 0.0
    labels = x.clone()
    labels[:, ::2] = -100
    scored = token_losses(model, {"input_ids": x, "labels": labels})
    torch.testing.assert_close(scored, wanted.view(len(x), -1)[:, ::2].flatten().double())


@pytest.mark.parametrize("metric", [*ARGS, "zero"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(metric, left):
    """The model mixes no positions, so padded batches must give what the unpadded sequences give."""
    model = tiny("relu")
    first, second = random_text(1, 20), random_text(1, 13, seed=5)
    pad = torch.zeros(1, 7, dtype=torch.long)
    ids = torch.cat([first, torch.cat([pad, second] if left else [second, pad], 1)])
    mask = torch.ones_like(ids)
    mask[1, slice(None, 7) if left else slice(13, None)] = 0
    arg = ARGS.get(metric)
    alone = sparsity(model, [first, second], metric, arg)
    padded = sparsity(model, [{"input_ids": ids, "attention_mask": mask}], metric, arg)
    assert padded.tokens == alone.tokens == 33
    assert padded.scored == alone.scored == 31
    assert padded.activation_ratio == pytest.approx(alone.activation_ratio, abs=1e-12)
    assert padded.ppl_ratio == pytest.approx(alone.ppl_ratio, rel=1e-6)


def test_zero_counts_what_relu_switches_off():
    model, x = tiny("relu", layers=1), random_text()
    s = torch.relu(model.layers[0].gate_proj(model.embed(x)))
    report = sparsity(model, [x])
    assert report.activation_ratio == float((s > 0).double().mean())
    assert report.ppl_ratio == 1.0
    assert sparsity(tiny("silu"), [x]).activation_ratio == 1.0


def test_topk_keeps_the_largest_of_each_token():
    model, x = tiny("silu", layers=1), random_text()
    report = sparsity(model, [x], "topk", 0.7)
    assert report.token_ratio.tolist() == pytest.approx([12 / NEURONS] * x.numel())
    block = model.layers[0]
    s = block.act_fn(block.gate_proj(model.embed(x)))
    kept = s * (s.abs() >= s.abs().sort(-1, descending=True).values[..., 11:12])
    down = block.down_proj(kept * block.up_proj(model.embed(x)))
    measured = Measurement(model, [x]).run("topk", 0.7).losses
    wanted = F.cross_entropy(
        model.head(model.embed(x) + down)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(measured, wanted.double())


def test_global_topk_keeps_as_many_of_the_whole_batch():
    report = sparsity(tiny("silu", layers=1), [random_text()], "topk", 0.7, scope="global")
    assert report.activation_ratio == pytest.approx(12 / NEURONS)
    assert float(report.token_ratio.std()) > 0


def test_cats_drops_its_share_in_every_layer_and_fat_over_all():
    model, x = tiny("silu"), random_text(4, 50)
    measured = Measurement(model, [x])
    # Sampled on the dense model; the first layer sees the same activations in the sparse one.
    assert next(iter(sparsity(measured, metric="cats", arg=0.4).per_layer.values())) == pytest.approx(0.6, abs=1e-3)
    criterion = measured.criterion("fat")
    assert float((criterion.pooled >= criterion.level(0.4)).double().mean()) == pytest.approx(0.6, abs=1e-3)
    assert criterion.sampled_ratio(criterion.level(0.4)) == pytest.approx(0.6, abs=0.05)
    bound = sparsity(measured, metric="fat", arg=0.3).thresholds
    assert bound.score == "gate"
    assert [float(value) for value in bound.values()] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("metric", ARGS)
def test_perplexity_rises_by_at_most_p(metric):
    model = tiny("silu")
    measured = Measurement(model, [learned(model, random_text(6, 60))])
    ratios = []
    for p in (1.0, 5.0, 20.0):
        report = sparsity(measured, metric=metric, p=p)
        # Perplexity is not continuous in the argument: one more neuron of some token may cross the target.
        assert report.ppl_ratio < 1 + p / 100
        assert report.p == p
        assert report.reached
        ratios.append(report.activation_ratio)
    assert ratios[0] > ratios[2]


@pytest.mark.parametrize("metric", ARGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_active_neurons_is_met(metric, kind):
    if metric == "fat" and kind == "plain":
        pytest.skip("a shared threshold moves the second layer's ratio in steps there")
    report = sparsity(Measurement(tiny(kind), [random_text(6, 60)]), metric=metric, ratio=0.3, tol=0.02)
    assert report.activation_ratio == pytest.approx(0.3, abs=0.02)


def test_bisection_is_that_of_the_paper():
    """A ratio of 1 + c crosses 1 % at c = 0.01; a curve below 1 first is crossed later."""
    found = match_perplexity(lambda c: 1 + c, 1.0)
    assert 0.01 - 1e-3 <= found.level < 0.01
    assert len(found.curve) == 10
    fine = match_perplexity(lambda c: 1 + c, 1.0, tol=1e-6)
    assert fine.level == pytest.approx(0.01, abs=1e-6)
    assert len(fine.curve) == 20
    assert match_perplexity(lambda c: 1 - c + 4 * c * c, 1.0).level == pytest.approx(0.2596, abs=1e-3)
    assert match_perplexity(lambda _: 2.0, 1.0).level == 0.0
    never = match_perplexity(lambda _: 1.005, 1.0)
    assert (never.level, never.reached) == (1.0, False)


def test_a_model_that_needs_no_neuron_says_so():
    model = tiny("silu")
    model.head.weight.zero_()
    report = cett_ppl(model, [random_text()])
    assert not report.reached
    assert report.cett == 1.0
    assert any("even with everything dropped" in note for note in report.notes)
    assert report.ppl_sparse == pytest.approx(VOCABULARY, rel=1e-6)


def test_joint_search_averages_the_ratio_over_checkpoints():
    batches = [learned(tiny("silu"), random_text(6, 60))]
    models = [tiny("silu") for _ in range(3)]
    for scale, model in enumerate(models):
        model.head.weight.mul_(1 + scale)
    joint = joint_cett_ppl(models, batches, p=5.0)
    mean = sum(report.ppl_ratio for report in joint.reports) / 3
    assert mean == pytest.approx(joint.ratio, rel=1e-12)
    assert mean < 1.05
    assert {report.cett for report in joint.reports} == {joint.cett}
    alone = joint_cett_ppl(models[:1], batches, p=5.0)
    assert alone.cett == cett_ppl(models[0], batches, p=5.0).cett
    with pytest.raises(ValueError, match="models is empty"):
        joint_cett_ppl([], batches)


def test_pareto_shares_the_dense_pass():
    measured = Measurement(tiny("silu"), [random_text()])
    reports = pareto(measured, metric="cett", grid=(0.05, 0.3))
    assert reports[0].activation_ratio > reports[1].activation_ratio
    assert reports[0].ppl_dense == reports[1].ppl_dense
    with pytest.raises(ValueError, match="grid is empty"):
        pareto(measured)
    with pytest.raises(ValueError, match="by='x'"):
        pareto(measured, grid=(0.1,), by="x")


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("metric", ["cett", "cats", "fat"])
def test_exported_thresholds_give_the_measured_model(metric, ending, tmp_path):
    model, x = tiny("silu"), random_text()
    measured = Measurement(model, [x])
    report = sparsity(measured, metric=metric, arg=ARGS[metric])
    stored = load_thresholds(export_thresholds(report, tmp_path / f"thresholds{ending}"))
    assert stored.about["method"] == metric
    assert stored.score == ("hidden" if metric == "cett" else "gate")
    with apply_thresholds(model, stored):
        assert torch.equal(token_losses(model, x), measured.run(metric, ARGS[metric]).losses)
    if metric == "cett":
        assert stored.about["eps"] == report.eps
        assert all(value.shape == (NEURONS,) for value in stored.values())
    with pytest.raises(ValueError, match="'topk' has no thresholds"):
        export_thresholds(sparsity(measured, metric="topk", arg=0.5), tmp_path / "none.json")


def test_calibration_text_may_be_another():
    model, x, other = tiny("silu"), random_text(), random_text(5, 40, seed=9)
    report = sparsity(Measurement(model, [x], calibration=[other]), metric="cett", arg=0.2)
    assert report.eps == cett_thresholds(model, [other], 0.2)
    assert report.tokens == x.numel()


def test_dropout_is_off_while_measuring():
    model = tiny("silu")
    model.layers[0].act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.train()
    first, second = (cett_ppl(model, [random_text()]).cett for _ in range(2))
    assert first == second
    assert model.training


def test_bfloat16_is_compared_in_float32():
    model, x = tiny("silu", layers=1).bfloat16(), random_text()
    eps = cett_thresholds(model, [x], 0.2)
    h, down = hidden(model, x)
    (bound,) = eps.values()
    kept = h.float().abs() >= (bound / down.weight.double().norm(dim=0).float())
    report = sparsity(model, [x], "cett", 0.2)
    assert report.activation_ratio == float(kept.double().mean())


def test_blocks_are_found_by_their_usual_names():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=24))
    assert [one.gate for one in feed_forwards(llama)] == [f"model.layers.{i}.mlp.act_fn@output" for i in range(2)]
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**small, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
    )
    for model, last in ((gpt2, "mlp.c_proj"), (opt, "fc2")):
        blocks = feed_forwards(model)
        assert [one.down.endswith(last) for one in blocks] == [True, True]
        assert not any(one.gated for one in blocks)
        report = sparsity(model, [random_text(2, 16)], "cett", 0.1)
        assert 0 < report.activation_ratio < 1
    pytest.importorskip("tilewright.nn.hybrid_linear_attention.modeling")
    from tilewright.nn import build_hybrid

    own = build_hybrid("softmax", "full", num_layers=2, hidden_size=16, num_heads=2, vocab_size=24)
    for metric in ("cett", "cats", "topk"):
        assert 0 < sparsity(own, [random_text(2, 16)], metric, 0.3).activation_ratio < 1


def test_blocks_of_ones_own():
    model, x = tiny("silu"), random_text()
    one = feed_forwards(model, ["layers.1.down_proj"])
    assert [block.name for block in one] == ["layers.1"]
    by_hand = FeedForward("second", "layers.1.down_proj", "layers.1.gate_proj@output", F.silu)
    for metric in ("cats", "topk", "zero"):
        found = sparsity(model, [x], metric, ARGS.get(metric), layers=["layers.1.down_proj"])
        same = sparsity(model, [x], metric, ARGS.get(metric), layers=[by_hand])
        assert same.activation_ratio == found.activation_ratio
        assert same.ppl_ratio == pytest.approx(found.ppl_ratio, rel=1e-6)
    nameless = FeedForward("second", "layers.1.down_proj")
    assert sparsity(model, [x], "cett", 0.1, layers=[nameless]).activation_ratio < 1
    with pytest.raises(ValueError, match="no module gives the gate's activation"):
        sparsity(model, [x], "cats", 0.1, layers=[nameless])


def test_bad_models_and_texts_are_named():
    model, x = tiny("silu"), random_text()
    with pytest.raises(ValueError, match="batches is empty"):
        cett_ppl(model, [])
    with pytest.raises(ValueError, match="score no token"):
        cett_ppl(model, [x[:, :1]])
    with pytest.raises(ValueError, match="no module named down_proj"):
        feed_forwards(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="a list of patterns"):
        feed_forwards(model, "layers")
    with pytest.raises(ValueError, match="layers is empty"):
        feed_forwards(model, [])
    experts = nn.ModuleDict({"experts": nn.ModuleList([model.layers[0]])})
    with pytest.raises(ValueError, match="an expert of a mixture sees only some tokens"):
        feed_forwards(experts)
    with pytest.raises(ValueError, match="without a float matrix"):
        feed_forwards(nn.ModuleDict({"down_proj": nn.Identity()}))
    with pytest.raises(ValueError, match="no block of the model"):
        apply_thresholds(model, {"layers.7": 0.1}).__enter__()
    with pytest.raises(ValueError, match="token ids"):
        token_losses(model, torch.zeros(2, 3))
    model.layers[1].up_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        cett_ppl(model, [x])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"metric": "cet"}, "did you mean"),
        ({"metric": "cett"}, "neither arg, p nor ratio"),
        ({"metric": "cett", "arg": 0.1, "p": 1.0}, "arg, p"),
        ({"metric": "zero", "p": 1.0}, "takes none of arg, p and ratio"),
        ({"metric": "cett", "p": 0.0}, "p=0.0"),
        ({"metric": "cett", "p": -1.0}, "p=-1.0"),
        ({"metric": "cett", "arg": 1.5}, "a tail error, 0 to 1"),
        ({"metric": "cats", "arg": -0.1}, "share of neurons dropped"),
        ({"metric": "fat", "arg": -0.1}, "threshold on"),
        ({"metric": "topk", "ratio": 1.5}, "between 0 and 1"),
        ({"metric": "cett", "p": 1.0, "tol": 0.0}, "tol=0.0"),
        ({"metric": "topk", "arg": 0.1, "scope": "batch"}, "'token' or 'global'"),
    ],
)
def test_bad_arguments_are_named(arguments, part):
    with pytest.raises(ValueError, match=part):
        sparsity(Measurement(tiny("silu"), [random_text()]), **arguments)


def test_cett_ppl_is_a_metric_of_its_own():
    measured = Measurement(tiny("silu"), [random_text()])
    assert sparsity(measured, metric="cett_ppl").to_dict() == cett_ppl(measured).to_dict()
    assert sparsity(measured, metric="cett_ppl", arg=5.0).p == 5.0
    with pytest.raises(ValueError, match="takes p"):
        sparsity(measured, metric="cett_ppl", ratio=0.5)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_at_one_percent(smollm2_gguf):
    from tilewright import evaluate, models

    model = models.load(smollm2_gguf)
    tokens = evaluate.text_corpus(model.tokenizer, "moby-dick", max_tokens=256)
    measured = Measurement(models.to_transformers(model, dequantize=True), evaluate.token_batches(tokens, length=128))
    report = cett_ppl(measured)
    assert 1 < report.ppl_ratio < 1.01
    # Half of this model's neurons cost 7 % and more, all of them nothing.
    assert 0.55 < report.activation_ratio < 0.85
    assert len(report.per_layer) == 30
