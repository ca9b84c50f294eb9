# SPDX-License-Identifier: Apache-2.0
"""Generation on a CUDA device: the decode step is captured once in a CUDA graph and replayed for every token.

A model runs as the native engine runs it, layer by layer, with the same weights, cache format and FP8 activations; each
piece is an operator of :mod:`tilewright.ops`, or plain torch where the engine has nothing of its own. Positions and
lengths live on the device, so that a replay needs nothing from Python but the tokens.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.formats.int4 import Int4Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.language_model import LanguageModel, Weight, check_maps
from tilewright.models.sequences import SequenceEngine
from tilewright.ops.int4_fp8_attention import int4_fp8_attention
from tilewright.ops.int4_linear import int4_fp8_linear
from tilewright.ops.kv_cache import KVCache, kv_append_
from tilewright.ops.token_ops import gated_activation, rms_norm, rope_angles, rope_rotate_

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    query_scale: Tensor | None
    key_scale: Tensor | None
    cache: KVCache
    o: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Freeing another graph's memory, as a collection may do, breaks off a capture under way."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaEngine(SequenceEngine):
    """A model on a CUDA device and the memory of ``batch`` sequences of up to ``max_length`` tokens.

    INT4 linears run as :func:`tilewright.ops.int4_fp8_linear`; other matrices as bfloat16 products. The residual stream
    is float32. One token for each sequence is one replay of a CUDA graph.

    Args:
        model: a loaded model with softmax attention.
        max_length: tokens that a sequence can hold; the model's limit when None.
        batch: sequences.
        device: a CUDA device. On "cpu" the same steps run without a graph, to compare with.
        kv_bits: 4 or 16; None: what the model's quantizer decided, else 16.
        mode: of the INT4 linears, "exact" or "fold"; None: what the model's quantizer decided, else "exact".

    Raises:
        ValueError: an option is out of range, a layer has linear attention, the weights are ternary, an activation map
            sits where it cannot be applied, or there is no CUDA device.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_length: int | None = None,
        batch: int = 1,
        *,
        device: torch.device | str = "cuda",
        kv_bits: int | None = None,
        mode: Literal["exact", "fold"] | None = None,
    ) -> None:
        model.require_softmax("CudaEngine")
        if model.has_thresholds:
            raise ValueError(
                "CudaEngine: the model drops neurons below thresholds (tw sparsify), which runs on the CPU; use "
                "Engine, or the checkpoint it was made from"
            )
        check_maps(model.config, model.maps, "CudaEngine")
        c = model.config
        if c.has_sub_norms or any(isinstance(weight, PackedTernary) for weight in model.weights.values()):
            raise ValueError("CudaEngine: the model is a BitNet or has ternary weights; run it with Engine on the CPU")
        length = c.max_position_embeddings if max_length is None else max_length
        if not 1 <= length <= c.max_position_embeddings:
            raise ValueError(f"CudaEngine: max_length = {length}, needed 1 .. {c.max_position_embeddings}")
        bits = int(model.settings.get("kv_bits", 16)) if kv_bits is None else kv_bits
        if bits not in (4, 16):
            raise ValueError(f"CudaEngine: kv_bits = {bits}, needed 4 or 16")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "CudaEngine: no CUDA device can be used here (`tw doctor` says why); use Engine on the CPU"
            )
        super().__init__(c, length, batch)
        self.device = torch.device(device)
        self._mode: Literal["exact", "fold"] = model.settings.get("mode", "exact") if mode is None else mode
        self._embedding = model.dense("model.embed_tokens.weight", torch.bfloat16).to(self.device)
        self._layers = [self._layer(model, i, "int4" if bits == 4 else "bf16") for i in range(c.num_hidden_layers)]
        self._norm = self._vector(model, "model.norm.weight")
        self._head = _dense(self._embedding, None) if c.tie_word_embeddings else self._linear(model, "lm_head")
        self._frequencies = c.rope_frequencies().to(self.device)
        self._maps = {
            name: tuple(part.float().to(self.device) for part in one.affine())
            for name, one in model.maps.items()
            if one.strength != 0.0
        }
        self._lengths = [0] * batch
        self._graph: torch.cuda.CUDAGraph | None = None
        self._next = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._each = torch.arange(batch + 1, dtype=torch.int64, device=self.device)
        self._logits = torch.zeros(0, device=self.device)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""
        return list(self._lengths)

    @property
    def state_nbytes(self) -> int:
        """Bytes of KV cache."""
        return sum(layer.cache.nbytes for layer in self._layers)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[s]`` tokens of each sequence.

        Raises:
            RuntimeError: a sequence does not hold that many.
        """
        for s, (wanted, held) in enumerate(zip(lengths, self._lengths, strict=True)):
            if not 0 <= wanted <= held:
                raise RuntimeError(f"CudaEngine: sequence {s} holds {held} tokens and cannot be cut to {wanted}")
        self._lengths = list(lengths)
        self._put_lengths()

    def forward(self, tokens: Sequence[Sequence[int]], all_logits: bool = False) -> Tensor:
        """Append tokens to every sequence, in one call.

        Args:
            tokens: one list for each sequence, possibly empty.

        Returns:
            float32 `[batch, vocabulary]` on the device: logits behind each sequence's last token, zeros for an empty
            list; or `[T, vocabulary]` behind all of them, sequence after sequence.

        Raises:
            RuntimeError: a token is outside the vocabulary, or a sequence grows beyond max_length; nothing is appended.
            ValueError: there are more or fewer lists than sequences.
        """
        counts = self._checked(tokens)
        packed = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64, device=self.device)
        if all(count == 1 for count in counts) and self.device.type == "cuda" and not all_logits:
            logits = self._decode(packed)
        else:
            logits = self._append(packed, counts, all_logits)
        self._lengths = [held + count for held, count in zip(self._lengths, counts, strict=True)]
        return logits

    def _checked(self, tokens: Sequence[Sequence[int]]) -> list[int]:
        if len(tokens) != self.batch:
            raise ValueError(f"CudaEngine: tokens for {len(tokens)} sequences, this engine has batch = {self.batch}")
        for s, (ids, held) in enumerate(zip(tokens, self._lengths, strict=True)):
            if held + len(ids) > self.max_length:
                raise RuntimeError(
                    f"CudaEngine: sequence {s} holds {held} tokens and {len(ids)} more exceed max_length = "
                    f"{self.max_length}; shorten the prompt, or make the engine with a larger max_length"
                )
            wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
            if wrong is not None:
                raise RuntimeError(f"CudaEngine: token {wrong} is outside 0 .. {self.config.vocab_size - 1}")
        return [len(ids) for ids in tokens]

    def _append(self, packed: Tensor, counts: list[int], all_logits: bool) -> Tensor:
        ends = torch.tensor(counts).cumsum(0)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(self.device)
        starts = [p for held, count in zip(self._lengths, counts, strict=True) for p in range(held, held + count)]
        positions = torch.tensor(starts, dtype=torch.int64, device=self.device)
        rows = None if all_logits else torch.tensor([int(e) - 1 for e, n in zip(ends, counts, strict=True) if n])
        logits = self._run(packed, positions, cu_seqlens, rows)
        if all_logits or all(counts):
            return logits
        spread = logits.new_zeros(self.batch, logits.shape[1])
        spread[[s for s, count in enumerate(counts) if count]] = logits
        return spread

    def replay(self) -> None:
        """One token more for each sequence on the device alone, the same as last time: what a step costs at least."""
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _decode(self, tokens: Tensor) -> Tensor:
        self._next.copy_(tokens)
        self.replay()
        return self._logits.clone()

    def _step(self) -> Tensor:
        return self._run(self._next, self._layers[0].cache.lengths.clone(), self._each, None)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """One step outside a graph, so that libraries set themselves up, then the graph; the lengths are put back."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._put_lengths()
        graph = torch.cuda.CUDAGraph()
        with _without_garbage_collection(), torch.cuda.graph(graph):
            self._logits = self._step()
        self._put_lengths()
        return graph

    def _put_lengths(self) -> None:
        lengths = torch.tensor(self._lengths, dtype=torch.int64)
        for layer in self._layers:
            layer.cache.lengths.copy_(lengths)

    def _run(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
        """Logits behind the tokens in ``rows`` (all when None); every sequence's cache is advanced."""
        c = self.config
        hidden = self._mapped("model.embed_tokens", self._embedding[tokens].float())
        angles = rope_angles(positions, self._frequencies, c.rotation_gain)
        for index, layer in enumerate(self._layers):
            at = f"model.layers.{index}"
            x = self._mapped(f"{at}.input_layernorm", rms_norm(hidden, layer.attention_norm, c.rms_norm_eps))
            q, k, v = (
                self._mapped(f"{at}.self_attn.{name}_proj", linear(x)).unflatten(-1, (-1, c.head_dim))
                for name, linear in (("q", layer.q), ("k", layer.k), ("v", layer.v))
            )
            rope_rotate_(q, angles, layer.query_scale)
            rope_rotate_(k, angles, layer.key_scale)
            kv_append_(layer.cache, k, v, cu_seqlens)
            attended = int4_fp8_attention(q, layer.cache, cu_seqlens, window=c.sliding_window)
            if rows is not None and index == len(self._layers) - 1:
                attended, hidden = attended[rows], hidden[rows]
            out = self._mapped(f"{at}.self_attn.o_proj", layer.o(attended.flatten(-2)))
            hidden = hidden + self._mapped(f"{at}.self_attn", out)
            x = self._mapped(f"{at}.post_attention_layernorm", rms_norm(hidden, layer.mlp_norm, c.rms_norm_eps))
            out = self._mapped(f"{at}.mlp.down_proj", layer.down(gated_activation(layer.gate(x), layer.up(x))))
            hidden = self._mapped(at, hidden + self._mapped(f"{at}.mlp", out))
        x = self._mapped("model.norm", rms_norm(hidden, self._norm, c.rms_norm_eps))
        return self._head(x)

    def _mapped(self, name: str, x: Tensor) -> Tensor:
        """Through the model's activation map at this place, if it has one."""
        if name not in self._maps:
            return x
        factor, summand = self._maps[name]
        return x * factor + summand

    def _layer(self, model: LanguageModel, index: int, kv: Literal["int4", "bf16"]) -> _Layer:
        c, prefix = self.config, f"model.layers.{index}."
        cache = KVCache.allocate(self.batch, c.num_key_value_heads, c.head_dim, self.max_length, kv).to(self.device)
        key_scale = prefix + "self_attn.key_scale"
        scale = self._vector(model, key_scale) if key_scale in model.weights else None
        projections = {name: self._linear(model, f"{prefix}self_attn.{name}_proj") for name in "qkvo"}
        mlp = {name: self._linear(model, f"{prefix}mlp.{name}_proj") for name in ("gate", "up", "down")}
        return _Layer(
            attention_norm=self._vector(model, prefix + "input_layernorm.weight"),
            mlp_norm=self._vector(model, prefix + "post_attention_layernorm.weight"),
            query_scale=None if scale is None else 1 / scale,
            key_scale=scale,
            cache=cache,
            **projections,
            **mlp,
        )

    def _vector(self, model: LanguageModel, name: str) -> Tensor:
        return model.dense(name).to(self.device)

    def _linear(self, model: LanguageModel, name: str) -> Linear:
        weight: Weight = model.weights[name + ".weight"]
        bias = self._vector(model, name + ".bias") if name + ".bias" in model.weights else None
        if isinstance(weight, Int4Weight):
            packed = weight.pack().to(self.device)
            mode = self._mode  # not self: an engine in a cycle would live until a garbage collection
            return lambda x: int4_fp8_linear(x, packed, bias, mode=mode)
        return _dense(model.dense(name + ".weight", torch.bfloat16).to(self.device), bias)


def _dense(weight: Tensor, bias: Tensor | None) -> Linear:
    """A bfloat16 product with float32 sums; the bias is added in float32."""

    def run(x: Tensor) -> Tensor:
        y = functional.linear(x.to(torch.bfloat16), weight).float()
        return y if bias is None else y + bias

    return run
