# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine against the float64 model; on a machine without a GPU its steps run on the CPU, without a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import engine_model, token_ids
from engine_oracle import BFLOAT16_NOISE, Formats, Oracle, distance
from torch import Tensor

from tilewright.models.cuda_engine import CudaEngine
from tilewright.models.engine import SamplingConfig

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


class RoundedOracle(Oracle):
    """Embedding, and input and output matrix of the head, in bfloat16, as the CUDA engine has them."""

    def logits(self, ids: list[int]) -> Tensor:
        name = "model.embed_tokens.weight"
        self.weights[name] = self.weights[name].to(torch.bfloat16).double()
        self.int8_head = self.int4_head = False
        self.weights[self.output] = self.weights[self.output].to(torch.bfloat16).double()
        return super().logits(ids)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        y = super()._norm(x, name)
        return self._disturb(y).to(torch.bfloat16).double() if name == "model.norm.weight" else y


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minima": {"symmetric": False},
    "key_scale": {"key_scale": True},
    "all_biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "own_head": {"tie_word_embeddings": False, "head": "bf16"},
    "wide_head": {"head_dim": 40},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_bits", [4, 16])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_match_the_float64_model(options: dict[str, Any], kv_bits: int, device: str) -> None:
    model, ids = engine_model(**options), token_ids(40)
    oracle = RoundedOracle(
        model, Formats("fp8", "int4" if kv_bits == 4 else "bf16", "fp8" if kv_bits == 4 else "float32")
    )
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact, BFLOAT16_NOISE)
    assert bound < 0.5, "the oracle is too unsteady to tell anything"
    engine = CudaEngine(model, 64, device=device, kv_bits=kv_bits)
    block = engine.forward([ids[:23]], all_logits=True)
    steps = [engine.step(token) for token in ids[23:]]
    assert engine.lengths == [40]
    assert distance(torch.cat([block, *steps]).cpu(), exact) <= bound


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_different_prompts_gives_what_each_gives_alone(device: str) -> None:
    model, prompts = engine_model(), [token_ids(5, 1), token_ids(11, 2), token_ids(1, 3)]
    greedy = SamplingConfig(max_new_tokens=9)
    together = list(CudaEngine(model, 64, 3, device=device).generate_batch(prompts, greedy, stop_tokens=()))
    for s, prompt in enumerate(prompts):
        alone = list(CudaEngine(model, 64, device=device).generate(prompt, greedy, stop_tokens=()))
        assert [row[s] for row in together] == alone


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_cut_back_can_be_written_again(device: str) -> None:
    engine, ids = CudaEngine(engine_model(), 32, device=device), token_ids(12)
    first = engine.forward([ids], all_logits=True)
    engine.truncate([5])
    assert engine.lengths == [5]
    again = engine.forward([ids[5:]], all_logits=True)
    assert distance(again, first[5:]) <= 1e-3  # a block of another length may sum in another order
    engine.reset()
    assert engine.lengths == [0]
    assert torch.equal(engine.forward([ids], all_logits=True), first)


def test_bad_input_is_named() -> None:
    model = engine_model()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device can be used here"):
            CudaEngine(model, 8)
    with pytest.raises(ValueError, match="max_length = 0, needed 1"):
        CudaEngine(model, 0, device="cpu")
    with pytest.raises(ValueError, match="kv_bits = 8, needed 4 or 16"):
        CudaEngine(model, 8, device="cpu", kv_bits=8)
    engine = CudaEngine(model, 4, device="cpu")
    with pytest.raises(RuntimeError, match=r"token 101 is outside 0 \.\. 100"):
        engine.forward([[101]])
    with pytest.raises(RuntimeError, match="5 more exceed max_length = 4"):
        engine.forward([[1] * 5])
    with pytest.raises(ValueError, match="tokens for 2 sequences"):
        engine.forward([[1], [2]])
    with pytest.raises(RuntimeError, match="holds 0 tokens and cannot be cut to 3"):
        engine.truncate([3])
    assert engine.lengths == [0]
