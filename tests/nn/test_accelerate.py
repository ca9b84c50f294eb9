# SPDX-License-Identifier: Apache-2.0
"""accelerate() changes the kernels of transformers models, not their outputs.

Every error is measured against the same weights in float64 with token-by-token recurrences, and may be at most twice
that of transformers' own code in the same dtype.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_models import MODELS, exact_model, linear_layers, tiny_model, token_ids

from tilewright.models.hf_names import cache_name
from tilewright.nn import accelerate

TOKENS = 21  # two chunks of 8 and a rest
every_model = pytest.mark.parametrize("kind", MODELS)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def three(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, theirs and exact."""
    theirs = run(model)
    with accelerate(model):
        ours = run(model)
    with pytest.MonkeyPatch.context() as patch:
        exact = run(exact_model(model, patch))
    return ours, theirs, exact


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, TOKENS), use_cache=False).logits


def logits_in_pieces(model: Any) -> Tensor:
    """A prompt, single tokens, then several at once upon a state."""
    ids, cache, out = token_ids(2, TOKENS), None, []
    with torch.no_grad():
        for piece in ids.split([11, 1, 1, 1, 7], dim=1):
            result = model(piece, use_cache=True, **{cache_name(): cache})
            cache = getattr(result, cache_name(), None) or result.cache_params
            out.append(result.logits)
    return torch.cat(out, dim=1)


def gradients(model: Any, seed: int = 3) -> Tensor:
    model.zero_grad()
    out = model(token_ids(2, TOKENS, seed), use_cache=False).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@every_model
@pytest.mark.parametrize("run", [logits, logits_in_pieces, gradients], ids=["prefill", "decode", "gradients"])
def test_outputs_and_gradients_are_as_exact_as_before(kind: str, run: Callable[[nn.Module], Tensor]) -> None:
    # Gradients of one draw of tokens now and then hang on a single gate near its end, where either error may be small.
    draws = [partial(gradients, seed=seed) for seed in (3, 4, 5)] if run is gradients else [run]
    errors = []
    for draw in draws:
        ours, theirs, exact = three(tiny_model(kind), draw)
        assert ours.dtype == theirs.dtype
        errors.append((distance(ours, exact), distance(theirs, exact)))
    assert 0 < sum(error for error, _ in errors) <= 2 * sum(error for _, error in errors)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "kimi_linear", "minimax", "falcon_h1"])
def test_bfloat16_models_are_as_exact_as_before(kind: str) -> None:
    ours, theirs, exact = three(tiny_model(kind, torch.bfloat16), logits_in_pieces)
    assert 0 < distance(ours, exact) <= 2 * distance(theirs, exact)


@every_model
def test_a_float64_model_is_computed_in_float64(kind: str) -> None:
    model = tiny_model(kind, torch.float64)
    ours, _, exact = three(model, logits_in_pieces)
    # What else rounds to float32 there: norms, gates and rotary angles of the models themselves, in both runs.
    assert distance(ours, exact) < 1e-12


@every_model
def test_greedy_generation_gives_the_same_tokens(kind: str) -> None:
    model, prompts = tiny_model(kind), token_ids(2, 12)
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    before = model.generate(prompts, **options)
    with accelerate(model) as handle:
        assert torch.equal(model.generate(prompts, **options), before)
    assert before.shape[1] == 24
    assert len(handle.layers) == linear_layers(kind)


@every_model
def test_the_layers_call_the_operators_until_undone(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: value for name, value in vars(sys.modules[type(model).__module__]).items() if callable(value)}
    with accelerate(model) as handle:
        changed = [n for n, f in before.items() if getattr(sys.modules[type(model).__module__], n) is not f]
        assert bool(changed) == (kind != "minimax")
        assert str(handle).count("->") == len(handle.replacements) > 0
    assert all(getattr(sys.modules[type(model).__module__], n) is f for n, f in before.items())
    assert not any("forward" in vars(layer) for layer in model.modules())
    handle.undo()


def test_two_models_of_one_class_share_the_functions_until_both_are_undone() -> None:
    first, second = tiny_model("bamba"), tiny_model("bamba")
    namespace = vars(sys.modules[type(first).__module__])
    before = namespace["mamba2_chunk_scan"]
    one, two = accelerate(first), accelerate(second)
    one.undo()
    one.undo()
    assert namespace["mamba2_chunk_scan"] is not before
    two.undo()
    assert namespace["mamba2_chunk_scan"] is before


def test_a_name_bound_by_someone_else_is_left_alone() -> None:
    model = tiny_model("bamba")
    namespace = vars(sys.modules[type(model).__module__])
    before = namespace["mamba2_chunk_scan"]
    handle = accelerate(model)
    namespace["mamba2_chunk_scan"] = print
    try:
        handle.undo()
        assert namespace["mamba2_chunk_scan"] is print
    finally:
        namespace["mamba2_chunk_scan"] = before


def test_functions_kept_on_the_layer_are_replaced_there() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chunk_gated_delta_rule = print

        def forward(self, q: Tensor, g: Tensor) -> Tensor:
            return self.chunk_gated_delta_rule(q, q, q, g=g, beta=torch.ones(1, 3, 2), use_qk_l2norm_in_kernel=True)[0]

    layer = Layer()
    before = layer.chunk_gated_delta_rule
    with accelerate(layer):
        assert layer(torch.ones(1, 3, 2, 4), torch.zeros(1, 3, 2)).shape == (1, 3, 2, 4)
    assert layer.chunk_gated_delta_rule is before


def test_packed_sequences_go_to_the_original_which_refuses_them() -> None:
    model = tiny_model("qwen3_next")
    with accelerate(model), pytest.raises(ValueError, match="packed sequences"):
        model(token_ids(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8], dtype=torch.int32))


def test_a_decay_per_channel_goes_to_the_original() -> None:
    namespace = vars(sys.modules[type(tiny_model("bamba")).__module__])
    state, x, dt = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.rand(1, 2, 3)
    inputs = (x, dt, -torch.rand(2, 3, 4), torch.randn(1, 1, 4), torch.randn(1, 1, 4))
    before = namespace["mamba2_selective_state_update"](state.clone(), *inputs)
    with accelerate(tiny_model("bamba")):
        assert torch.equal(namespace["mamba2_selective_state_update"](state.clone(), *inputs), before)


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear has no layer that calls one of chunk_gated_delta_rule"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a str"):
        accelerate("model")  # type: ignore[arg-type]


def test_every_function_that_transformers_would_take_from_flash_linear_attention_is_known() -> None:
    import transformers

    from tilewright.nn.accelerate import _FUNCTIONS

    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    pattern = re.compile(r'_with_fallback\("\w+", "fla"\)\ndef (\w+)')
    names = {name for file in files for name in pattern.findall(file.read_text())}
    assert names
    assert names <= set(_FUNCTIONS)


@pytest.mark.parametrize("kind", ["kimi_linear", "falcon_h1", "minimax"])
def test_a_compiled_layer_runs_the_operators(kind: str) -> None:
    model = tiny_model(kind)
    with accelerate(model) as handle, torch.no_grad():
        layer = model.get_submodule(handle.layers[0])
        name = "position_embeddings" if kind == "minimax" else "cache"
        options = {name: None, "attention_mask": None}
        x = torch.randn(2, TOKENS, 32)
        plain = layer(x, **options)
        compiled = torch.compile(lambda x: layer(x, **options), backend="aot_eager", fullgraph=True)(x)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    assert torch.equal(first(compiled), first(plain))


@pytest.mark.parametrize("kind", ["kimi_linear", "bamba", "minimax"])
def test_export_goes_to_the_original(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    before = logits(model)
    with accelerate(model):
        assert torch.equal(logits(model), before)
