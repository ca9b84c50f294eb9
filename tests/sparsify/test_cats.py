# SPDX-License-Identifier: Apache-2.0
"""CATS on torch models: calibration, layers, reports, baselines, tuning."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from sparse_models import VOCABULARY, PlainMLP, batches, small_model
from torch import nn

from tilewright.adapt import merge_lora
from tilewright.nn import CATSMLP
from tilewright.nn.cats_mlp import act_name
from tilewright.sparsify.cats import (
    Thresholds,
    Tuning,
    apply_cats,
    calibrate_thresholds,
    collect_scores,
    finetune,
    mean_sparsity,
    random_mask,
    relu_swap,
    remove_cats,
    sparsified,
    sparsity_report,
    thresholded,
    top_k,
)
from tilewright.sparsify.mlps import Names, gated_mlps

DATA = batches()


def outputs(module: nn.Module, model: Any, data: list[torch.Tensor]) -> torch.Tensor:
    """[tokens, M] of a module, by a hook of our own."""
    seen = []
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out.flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat(seen)


def activations(model: Any, data: list[torch.Tensor], layer: int) -> torch.Tensor:
    """|silu(W_gate x)| of a layer."""
    gates = outputs(model.model.layers[layer].mlp.gate_proj, model, data)
    return torch.nn.functional.silu(gates).flatten().abs()


@pytest.mark.parametrize("k", [0.0, 0.3, 0.5, 0.9])
def test_exact_thresholds_drop_their_share(k: float) -> None:
    model = small_model()
    found = calibrate_thresholds(model, DATA, k)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer, name in enumerate(found):
        values = activations(model, DATA, layer)
        rank = math.ceil(round(k * len(values), 6))
        wanted = 0.0 if rank == 0 else float(values.sort().values[rank - 1])
        assert float(found[name]) == wanted
        assert k - 1 / len(values) <= float((values < found[name]).double().mean()) <= k + 1e-9


def test_histogram_thresholds_are_close() -> None:
    model = small_model()
    exact, streamed = calibrate_thresholds(model, DATA, 0.6), calibrate_thresholds(model, DATA, 0.6, "hist")
    for layer, name in enumerate(exact):
        values = activations(model, DATA, layer)
        share = float((values < streamed[name]).double().mean())
        assert abs(share - 0.6) <= 0.002
        assert abs(float(streamed[name] / exact[name]) - 1) < 2**-13


def test_padding_does_not_count() -> None:
    model = small_model()
    ids, mask = DATA[0].clone(), torch.ones_like(DATA[0])
    mask[1, 20:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    found = calibrate_thresholds(model, [padded], 0.5)
    ids[1, 20:] = 3
    assert torch.equal(found["model.layers.0.mlp"], calibrate_thresholds(model, [padded], 0.5)["model.layers.0.mlp"])


def test_rankings_by_neuron() -> None:
    model = small_model()
    normed = calibrate_thresholds(model, DATA, 0.5, ranking="norm")
    for layer, name in enumerate(normed):
        norms = model.model.layers[layer].mlp.down_proj.weight.norm(dim=0)
        products = normed[name] * norms
        # one threshold of the score for all neurons
        assert torch.allclose(products, products.mean(), rtol=1e-5)
        values = activations(model, DATA, layer).unflatten(0, (-1, 48))
        assert abs(float((values < normed[name]).double().mean()) - 0.5) < 1e-3
    up = calibrate_thresholds(model, iter(DATA), 0.5, ranking="up")
    for layer, name in enumerate(up):
        u = outputs(model.model.layers[layer].mlp.up_proj, model, DATA)
        products = up[name] * u.double().square().mean(0).sqrt()
        assert torch.allclose(products, products.mean(), rtol=1e-5)
        values = activations(model, DATA, layer).unflatten(0, (-1, 48))
        assert abs(float((values < up[name]).double().mean()) - 0.5) < 1e-3
    hidden = calibrate_thresholds(model, DATA, 0.5, ranking="output")
    assert hidden.score == "hidden"
    with sparsified(model, thresholded(hidden)) as kept, torch.no_grad():
        model(DATA[0])
    assert abs(kept.mean() - 0.5) < 0.05
    with pytest.raises(ValueError, match="score 'hidden'"):
        apply_cats(model, hidden)


def test_one_threshold_for_the_model() -> None:
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(0.1)
    scores = collect_scores(model, DATA)
    everywhere = scores.global_threshold(0.5)
    assert float(everywhere["model.layers.0.mlp"]) == float(everywhere["model.layers.1.mlp"])
    shares = [one.sparsity for one in sparsity_report(model, DATA, everywhere)]
    assert abs(sum(shares) / 2 - 0.5) < 1e-3
    assert shares[0] > shares[1] + 0.05


def test_few_values_warn() -> None:
    with pytest.warns(UserWarning, match="only 96 activations"):
        calibrate_thresholds(small_model(), [torch.tensor([[1, 2]])], 0.5)


@pytest.mark.parametrize("k", [1.0, -0.1, float("nan")])
def test_bad_shares(k: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        calibrate_thresholds(small_model(), DATA, k)


@pytest.mark.parametrize(
    ("family", "act"), [("llama", "silu"), ("mistral", "silu"), ("qwen2", "silu"), ("gemma", "gelu_tanh")]
)
def test_families(family: str, act: str) -> None:
    model = small_model(family)
    mlps = gated_mlps(model)
    assert [one.act for one in mlps.values()] == [act, act]
    found = calibrate_thresholds(model, DATA, 0.5)
    with torch.no_grad():
        apply_cats(model, found)
        assert model(DATA[0]).logits.isfinite().all()
    assert abs(mean_sparsity(sparsity_report(model, DATA)) - 0.5) < 0.06


def test_other_names_and_no_gate() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
            self.function = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.w2(self.function(self.w1(x)) * self.w3(x))
            return out

    model = nn.Sequential(Odd(), Odd())
    parts = Names("w1", "w3", "w2", "function")
    x = torch.randn(200, 8)
    found = calibrate_thresholds(model, [x], 0.4, names=parts)
    assert list(found) == ["0", "1"]
    dense = model(x)
    apply_cats(model, Thresholds(dict.fromkeys(found, torch.zeros(()))), names=parts)
    assert torch.allclose(model(x), dense, atol=1e-5)
    remove_cats(model)
    assert isinstance(model[0], Odd)
    assert torch.equal(model(x), dense)
    with pytest.raises(ValueError, match="block is an MLP without a gate"):
        gated_mlps(PlainMLP())
    with pytest.raises(ValueError, match=r"block .* has no w1"):
        gated_mlps(PlainMLP(), {"block": parts})


def test_activations_are_told_by_what_they_compute() -> None:
    assert act_name(nn.GELU()) == "gelu"
    assert act_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert act_name(torch.nn.functional.relu) == "relu"
    with pytest.raises(ValueError, match="knows silu"):
        act_name(torch.tanh)


def test_apply_and_remove() -> None:
    model = small_model()
    before = model(DATA[0]).logits
    originals = [layer.mlp for layer in model.model.layers]
    found = calibrate_thresholds(model, DATA, 0.5)
    apply_cats(model, found)
    assert all(isinstance(layer.mlp, CATSMLP) for layer in model.model.layers)
    assert not torch.allclose(model(DATA[0]).logits, before, atol=1e-3)
    with pytest.raises(ValueError, match="already"):
        apply_cats(model, found)
    remove_cats(model)
    assert [layer.mlp for layer in model.model.layers] == originals
    assert torch.equal(model(DATA[0]).logits, before)
    with pytest.raises(ValueError, match="to remove"):
        remove_cats(model)
    with pytest.raises(ValueError, match="no such MLP"):
        apply_cats(model, Thresholds({"model.layers.9.mlp": torch.tensor(0.1)}))
    with pytest.raises(ValueError, match="48 neurons"):
        apply_cats(model, Thresholds({"model.layers.0.mlp": torch.ones(3)}))
    assert [layer.mlp for layer in model.model.layers] == originals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_and_many_agree(dtype: torch.dtype) -> None:
    mlp = CATSMLP.from_dense(small_model().model.layers[0].mlp.to(dtype), 0.2)
    x = torch.randn(40, 32).to(dtype)
    with torch.no_grad():
        many, few = mlp(x), torch.cat([mlp(part) for part in x.split(8)])
    # bfloat16: the dense form rounds up(x) and h, the operator neither
    bound = 1e-5 if dtype == torch.float32 else 3 * 2.0**-8 * float(many.abs().max())
    assert float((many - few).abs().max()) <= bound
    assert few.dtype == dtype


def test_the_transposed_weight_follows_the_weight() -> None:
    mlp = CATSMLP.from_dense(small_model().model.layers[0].mlp, 0.1)
    x = torch.randn(2, 32)
    with torch.no_grad():
        before = mlp(x)
        mlp.down_proj.weight.mul_(2)
        assert torch.allclose(mlp(x), 2 * before, rtol=1e-5)
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight / 4)
        assert torch.allclose(mlp(x), before / 2, rtol=1e-5)


def test_report_counts_what_is_dropped() -> None:
    model = small_model()
    found = calibrate_thresholds(model, DATA, 0.7)
    report = sparsity_report(model, DATA, found)
    values = activations(model, DATA, 0).unflatten(0, (len(DATA), -1, 48))
    dropped = values < found["model.layers.0.mlp"]
    assert report[0].sparsity == pytest.approx(float(dropped.double().mean()))
    assert report[0].union == pytest.approx(float(dropped.all(1).double().mean()))
    assert report[0].tokens == 4 * 64
    apply_cats(model, found)
    # a batch so small that the layers themselves would not run
    one = sparsity_report(model, torch.tensor([[5]]))
    assert one[0].sparsity == one[0].union
    with pytest.raises(ValueError, match="no CATS thresholds"):
        sparsity_report(small_model(), DATA)


def test_baselines_keep_what_they_say() -> None:
    model = small_model()
    with torch.no_grad():
        dense = model(DATA[0]).logits
        for keep, share in ((top_k(0.25), 0.25), (random_mask(0.3, 1), 0.3)):
            with sparsified(model, keep) as kept:
                changed = model(DATA[0]).logits
            assert abs(kept.mean() - share) < 0.02
            assert not torch.allclose(changed, dense, atol=1e-3)
        with sparsified(model, random_mask(0.0)):
            assert torch.allclose(model(DATA[0]).logits, dense, atol=1e-4)
        assert torch.equal(model(DATA[0]).logits, dense)


def test_relu_swap_is_the_model_with_relu() -> None:
    model = small_model()
    swapped = copy.deepcopy(model)
    for layer in swapped.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    with torch.no_grad(), sparsified(model, relu_swap(), act="relu"):
        assert torch.allclose(model(DATA[0]).logits, swapped(DATA[0]).logits, atol=1e-5)


def test_thresholded_is_the_layer() -> None:
    model = small_model()
    found = calibrate_thresholds(model, DATA, 0.5)
    with torch.no_grad():
        with sparsified(model, thresholded(found)):
            masked = model(DATA[0]).logits
        assert torch.allclose(apply_cats(model, found)(DATA[0]).logits, masked, atol=1e-4)


def test_greedy_tokens_are_those_of_the_masked_model() -> None:
    model = small_model()
    found = calibrate_thresholds(model, DATA, 0.5)
    options: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    with sparsified(model, thresholded(found)):
        masked = model.generate(DATA[0], **options)
    assert torch.equal(apply_cats(model, found).generate(DATA[0], **options), masked)


def test_tuning_lowers_the_loss_and_leaves_thresholds() -> None:
    model = small_model()
    text = [torch.arange(1, 33).remainder(VOCABULARY)[None].repeat(2, 1)]
    apply_cats(model, calibrate_thresholds(model, DATA, 0.7))
    before = [layer.mlp.threshold.clone() for layer in model.model.layers]
    losses = finetune(model, text, Tuning(steps=30, accumulation=1, lr=1e-2))
    assert losses[-1] < 0.5 * losses[0]
    assert [float(layer.mlp.threshold) for layer in model.model.layers] == [float(t) for t in before]
    trained = model(text[0]).logits
    merge_lora(model)
    assert torch.allclose(model(text[0]).logits, trained, atol=1e-3)
    with pytest.raises(ValueError, match="empty"):
        finetune(small_model(), [])
    with pytest.raises(ValueError, match="positive"):
        Tuning(steps=0)
