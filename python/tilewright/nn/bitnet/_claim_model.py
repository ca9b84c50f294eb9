# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with all decoder linears rounded to ternary values: same integers, same tokens, bytes and speed.

Rounding a trained model so ruins its predictions; the shapes and the work are what is measured here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most

PROMPT = 16


class FloatTernary(nn.Module):
    """The layer in torch: activations rounded, ternary values kept as float32."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.values, self.scale = values.float(), scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        token = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((x / token).round() @ self.values.T) * (token * self.scale)


def rows(experiment: Experiment) -> Iterator[Row]:
    """Integers, tokens, bytes, speed."""
    from tilewright.data import smollm2_gguf
    from tilewright.formats import PackedTernary, pack_ternary, quantize_ternary
    from tilewright.models import load, to_transformers
    from tilewright.models.engine import Engine
    from tilewright.models.language_model import linear_names

    model = load(smollm2_gguf())
    experiment.say("rounding SmolLM2's linears")
    packed_bytes = float_bytes = 0
    for name in linear_names(model.config):
        codes, scale = quantize_ternary(model.dense(name))
        model.weights[name] = weight = pack_ternary(codes, "q2", scale=scale)
        packed_bytes, float_bytes = packed_bytes + weight.nbytes, float_bytes + 4 * codes.numel()
    experiment.values["bytes"] = {"packed": packed_bytes, "float32": float_bytes}
    ids = [
        int(i) for i in model.tokenizer("The state of the Union is strong, and the people of this country")["input_ids"]
    ]
    experiment.say("integers of every linear")
    layers = 3 if experiment.quick else model.config.num_hidden_layers
    wrong = 0
    for name in list(linear_names(model.config))[: 7 * layers]:
        held = model.weights[name]
        assert isinstance(held, PackedTernary)
        wrong += different(held)
    yield at_most("int32 sums that differ from int64 products, of SmolLM2's linears", wrong, 0)
    yield at_most("bytes of the packed linears over float32", packed_bytes / float_bytes, 1 / 15)
    count = 12 if experiment.quick else 48
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs: Any = to_transformers(model, kv_bits=16)
        experiment.say("greedy tokens, operator by operator")
        with torch.no_grad():
            plain = theirs.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
        engine = Engine(model, PROMPT + 2 * count + 64, kv_bits=16)
        tokens = list(engine.generate(ids, max_new_tokens=count, stop_tokens=()))
        yield at_most(
            "greedy tokens that differ between engine and operators",
            sum(a != b for a, b in zip(tokens, plain[0, len(ids) :].tolist(), strict=True)),
            0,
        )
        experiment.say("speed on one thread")
        speeds = {
            "engine, packed": speed(lambda: consume(engine, ids, count), count),
            "torch, float32": speed(torch_decoding(model, ids, count // 3), count // 3),
        }
    finally:
        torch.set_num_threads(before)
    experiment.values["speed"] = speeds
    ratio = speeds["engine, packed"] / speeds["torch, float32"]
    yield experiment.in_full(at_least("decoding speed over the same layers in float32 torch, one thread", ratio, 3.0))


def different(weight: Any) -> int:
    """Sums of `ternary_matmul` that are not the exact ones, for random, largest and smallest codes."""
    from tilewright import ops

    random = torch.Generator().manual_seed(0)
    columns = weight.shape[1]
    x = torch.randint(-128, 128, (3, columns), generator=random, dtype=torch.int8)
    x[1], x[2] = 127, -128
    exact = (x.double() @ weight.unpack().double().T).to(torch.int64)
    return int((ops.ternary_matmul(x, weight) != exact).sum())


def consume(engine: Any, ids: list[int], count: int) -> float:
    """Seconds of decoding, the prompt not counted."""
    stream = engine.generate(ids, max_new_tokens=count + 1, stop_tokens=())
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def torch_decoding(model: Any, ids: list[int], count: int) -> Any:
    """A function that decodes with transformers, linears as :class:`FloatTernary`, and gives the seconds."""
    from tilewright.formats import PackedTernary
    from tilewright.models import LanguageModel, to_transformers

    plain = LanguageModel(model.config, {n: model.dense(n, torch.float32) for n in model.weights})
    theirs: Any = to_transformers(plain, dequantize=True)
    for name, weight in model.weights.items():
        if isinstance(weight, PackedTernary):
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            layer = FloatTernary(weight.unpack(), weight.scale)
            theirs.get_submodule(owner).register_module(leaf, layer)

    def run() -> float:
        from transformers import DynamicCache

        from tilewright.models.hf_names import cache_name

        cache = DynamicCache()
        with torch.no_grad():
            token = theirs(torch.tensor([ids]), **{cache_name(): cache}).logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for _ in range(count):
                token = theirs(token, **{cache_name(): cache}).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return run


def speed(run: Any, count: int) -> float:
    """Tokens a second, the best of three: other work only ever adds time."""
    return count / min(run() for _ in range(3))
