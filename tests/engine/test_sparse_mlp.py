# SPDX-License-Identifier: Apache-2.0
"""MLPs with thresholds in the engine: reading few rows gives the bits of reading all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_models import engine_model, token_ids
from engine_oracle import Formats, Oracle, distance

from tilewright.formats import quantize_int4
from tilewright.formats.int4_sparse import pack_columns, pack_rows
from tilewright.models import LanguageModel, to_transformers
from tilewright.models.engine import Engine
from tilewright.models.image import compile, seal
from tilewright.models.language_model import threshold_name

IDS = token_ids(32)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_thresholds(model: LanguageModel, value: float, per_neuron: bool = False) -> LanguageModel:
    """Every layer drops gate activations below the value, or below half to once and a half of it by neuron."""
    size = model.config.intermediate_size
    factor = torch.rand(size, generator=torch.Generator().manual_seed(5)) + 0.5
    threshold = value * factor if per_neuron else torch.tensor([value])
    added: dict[str, Any] = {threshold_name(i): threshold.clone() for i in range(model.config.num_hidden_layers)}
    return dataclasses.replace(model, weights={**model.weights, **added})


def in_bfloat16(model: LanguageModel) -> LanguageModel:
    weights: dict[str, Any] = {
        name: weight.dequantize(torch.bfloat16) if "mlp" in name and not isinstance(weight, torch.Tensor) else weight
        for name, weight in model.weights.items()
    }
    return dataclasses.replace(model, weights=weights)


def decoded(image: Any) -> torch.Tensor:
    """Logits of every token, decoded one at a time after a short prompt."""
    engine = Engine(image, 128)
    first = engine.forward([IDS[:5]], all_logits=True)
    return torch.cat([first, *(engine.step(token) for token in IDS[5:])])


MODELS: dict[str, dict[str, Any]] = {
    "minima": {"symmetric": False},
    "symmetric": {},
    "group_64": {"group": 64, "hidden_size": 128, "intermediate_size": 192},
    "short_group": {"group": 64, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6},
    "biases": {"mlp_bias": True, "symmetric": False},
    "narrow": {"hidden_size": 32, "num_attention_heads": 2, "symmetric": False},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
def test_few_rows_give_the_bits_of_all_rows(level: str, options: dict[str, Any], per_neuron: bool) -> None:
    model = with_thresholds(engine_model(**options), 0.2, per_neuron)
    wanted = decoded(compile(model, kv="bf16", sparse=False))
    image = compile(model, kv="bf16")
    assert image.nbytes > compile(model, kv="bf16", sparse=False).nbytes, "the rows are not kept"
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(decoded(image), wanted)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4, 1e9])
def test_bfloat16_rows(level: str, threshold: float) -> None:
    model = with_thresholds(in_bfloat16(engine_model(mlp_bias=True)), threshold)
    torch.set_num_threads(2)
    assert torch.equal(decoded(compile(model)), decoded(compile(model, sparse=False)))


def test_a_scale_for_the_whole_token() -> None:
    model = with_thresholds(engine_model(symmetric=False), 0.3)
    images = [compile(model, scale_group=0, sparse=sparse) for sparse in (True, False)]
    assert torch.equal(decoded(images[0]), decoded(images[1]))


def test_zero_thresholds_change_no_bit() -> None:
    model = engine_model(symmetric=False, mlp_bias=True)
    plain = decoded(compile(model))
    assert torch.equal(decoded(compile(with_thresholds(model, 0.0))), plain)


def test_dropping_everything_leaves_the_attention() -> None:
    model = engine_model()
    silent = with_thresholds(model, 1e30)
    for index in range(model.config.num_hidden_layers):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        down = model.weights[name]
        model.weights[name] = quantize_int4(torch.zeros(down.shape), 32, torch.float16)
    assert torch.equal(decoded(compile(silent)), decoded(compile(model)))


class MaskedOracle(Oracle):
    """The float64 model with dropped neurons: a gate of 0 gives an activation of 0."""

    threshold = 0.0

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = super()._linear(x, name)
        if not name.endswith("gate_proj"):
            return y
        return torch.where(torch.nn.functional.silu(y).abs() < self.threshold, 0.0, y)


def test_logits_match_the_float64_model() -> None:
    model, formats = engine_model(), Formats("int8", "bf16", "float32")
    oracle = MaskedOracle(model, formats)
    oracle.threshold = 0.2
    exact = oracle.logits(IDS[:30])
    bound = oracle.bound(IDS[:30], exact)
    assert bound < 0.35
    image = compile(with_thresholds(model, 0.2), "int8", "bf16", "float32", scale_group=0)
    assert distance(Engine(image, 64).logits(IDS[:30]), exact) <= bound
    dense = compile(model, "int8", "bf16", "float32", scale_group=0)
    assert distance(Engine(dense, 64).logits(IDS[:30]), exact) > bound, "the thresholds do nothing"


@pytest.mark.parametrize("act", ["fp8"])
def test_formats_without_rows_read_all(act: Any) -> None:
    model = with_thresholds(engine_model(), 0.2)
    image = compile(model, act)
    assert any("all rows are read" in note for note in image.notes)
    assert decoded(image).isfinite().all()


def test_transformers_gives_the_engines_bits() -> None:
    model = with_thresholds(engine_model(symmetric=False, mlp_bias=True), 0.25)
    theirs = to_transformers(model, kv_bits=16)
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS[:20]])).logits[0]
    assert torch.equal(logits, Engine(model, 64, kv_bits=16).logits(IDS[:20]))


def test_a_batch_decodes_as_its_sequences_do() -> None:
    image = compile(with_thresholds(engine_model(symmetric=False), 0.2))
    both = Engine(image, 64, batch=2)
    both.forward([IDS[:4], IDS[10:13]])
    together = both.forward([IDS[4:5], IDS[13:14]])
    for index, (prompt, token) in enumerate([(IDS[:4], IDS[4]), (IDS[10:13], IDS[13])]):
        alone = Engine(image, 64)
        alone.forward([prompt])
        assert torch.equal(alone.step(token)[0], together[index])


def test_nan_activations_stay_nan() -> None:
    model = engine_model(head="bf16")
    table = model.weights["model.embed_tokens.weight"]
    assert isinstance(table, torch.Tensor)
    table[7] = float("nan")
    image = compile(with_thresholds(model, 0.2))
    engine = Engine(image, 16)
    engine.forward([[1, 2]])
    assert bool(engine.step(7).isnan().all())


def test_rows_and_columns_hold_the_codes() -> None:
    weight = quantize_int4(torch.randn(70, 96), 32, torch.float16, symmetric=False)
    rows, columns = pack_rows(weight), pack_columns(weight)
    assert rows.numel() == 64 + 70 * 64
    # scales and minima of 128 outputs in float16, 32 runs of 64 bytes, three groups
    assert columns.numel() == 64 + 3 * (2 * 256 + 32 * 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        pack_rows(quantize_int4(torch.randn(8, 48), 16))


THRESHOLDS_AT, FLAG_FROM_END = 12, 5


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (THRESHOLDS_AT, 7, "has 7 thresholds, needed 1 or 96"),
        (THRESHOLDS_AT + 1, 1 << 40, "threshold"),
        (-FLAG_FROM_END, 2, "sparse"),
        (-FLAG_FROM_END + 1, 64, "up by rows"),
        (-FLAG_FROM_END + 3, 0, "down by columns"),
    ],
)
def test_a_damaged_record_is_an_error(offset: int, value: int, message: str) -> None:
    image = compile(with_thresholds(engine_model(), 0.2))
    program = image.program.clone()
    words = program.tolist()
    at = next(i for i in range(len(words) - 1) if words[i] == 12 and 20 < words[i + 1] < 40)
    program[at + offset if offset > 0 else at + 2 + words[at + 1] + offset] = value
    with pytest.raises(RuntimeError, match=message):
        Engine(dataclasses.replace(image, program=seal(program)), 16).step(3)
