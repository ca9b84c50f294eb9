# SPDX-License-Identifier: Apache-2.0
"""Liger: a pretrained softmax model as a gated recurrent one, without new parameters (Lan et al., arXiv 2503.01496)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright.linearize.attention import ConvertedAttention, base_attention, rotate
from tilewright.linearize.conversion import convert
from tilewright.linearize.liger.config import LigerConfig, LigerRecipe
from tilewright.linearize.liger.recurrence import features, recurrent_branch
from tilewright.linearize.window import State, remember, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tilewright.linearize.cache import StateLayer
    from tilewright.linearize.tuning import Batches

_STATES = ("recurrent_state", "slot_keys")


def liger_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None = None,
    *,
    cos: Tensor,
    sin: Tensor,
    config: LigerConfig | None = None,
    real: Tensor | None = None,
    state: State | None = None,
    mode: str = "chunk",
    **settings: Any,
) -> Tensor:
    """o = alpha y_recurrent + beta y_window: gated recurrence without positions, and rotary softmax over a window.

    Args:
        q: [B, T, H, D]; k, v: [B, T, H_kv, D]; before rotary embedding.
        f: gate logits [B, T, H_kv, D]; the key itself when None (the method).
        cos, sin: [B or 1, T, D].
        config: of the layer; or its fields as ``settings``.
        real: bool [B, T], False at padding, which must precede a row's tokens; None: no padding.
        state: what earlier positions left; continued and updated. None: the text begins here.
        mode: "chunk" or "recurrent".

    Returns:
        [B, T, H, D] in float32 (float64 for float64 inputs): the branches are mixed before any rounding.

    Raises:
        ValueError: a setting is not allowed, or shapes do not fit.
    """
    config = LigerConfig(**settings) if config is None else config
    out: Tensor | None = None
    tokens = q.shape[1]
    if config.alpha:
        x = features(q, k, v, k if f is None else f, config, real)
        held = {} if state is None else {n: t for n in _STATES if (t := state.get(n)) is not None}
        y, states = recurrent_branch(x, config, held, mode=mode, final=state is not None)
        if state is not None:
            state.put(0, **states)
        out = config.alpha * y
    if config.beta:
        keys, values, seen = remember(state, rotate(k, cos, sin), v, real, config.window_size)
        y, _ = window_attention(rotate(q, cos, sin), keys, values, window=config.window_size, real=seen)
        out = config.beta * y if out is None else out + config.beta * y
    if state is not None:
        state.put(tokens)
    assert out is not None
    return out


class LigerAttention(ConvertedAttention):
    """Liger in the place of a Llama-type model's attention; it has the projections of the base layer and nothing else.

    Args:
        config: a transformers configuration (new projections are made) or one of transformers' attention modules
            (its projections are taken over).
        layer_idx: of the layer, with a configuration.
        settings: fields of :class:`LigerConfig`, or ``liger=`` one of them.

    Raises:
        ValueError: the architecture cannot be converted, or a setting is not allowed.
    """

    def __init__(
        self, config: Any, layer_idx: int | None = None, *, liger: LigerConfig | None = None, **settings: Any
    ) -> None:
        super().__init__(config if isinstance(config, nn.Module) else base_attention(config, layer_idx or 0))
        self.liger = LigerConfig(**settings) if liger is None else liger
        if not isinstance(self.liger.pool, str) and self.head_dim % self.liger.pool:
            raise ValueError(f"pool={self.liger.pool} does not divide the head size {self.head_dim}")
        if self.liger.gate == "random":
            self.register_buffer("gate_matrix", self._random_gate())

    def _random_gate(self) -> Tensor:
        """For the ablation: a fixed random map of each head's key to gate logits of the same mean square."""
        generator = torch.Generator("cpu").manual_seed(self.layer_idx)
        shape = (self.num_key_value_heads, self.head_dim, self.head_dim)
        matrix = torch.randn(shape, generator=generator, device="cpu") * self.head_dim**-0.5
        return matrix.to(self.k_proj.weight.device)

    def gate_logits(self, k: Tensor) -> Tensor:
        """[B, T, H_kv, D]: the key, by the method."""
        if self.liger.gate != "random":
            return k
        return torch.einsum("bthd,hde->bthe", k, self.get_buffer("gate_matrix").to(k.dtype))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None, state: StateLayer | None
    ) -> Tensor:
        """:func:`liger_attention` with the key as gate."""
        return liger_attention(
            q, k, v, self.gate_logits(k), cos=cos, sin=sin, config=self.liger, real=real, state=state
        )

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"variant={self.liger.variant}, window_size={self.liger.window_size}"


def attention(base: nn.Module, config: LigerConfig) -> LigerAttention:
    """The converted module with the base layer's projections."""
    return LigerAttention(base, liger=config)


def convert_to_liger(
    model: PreTrainedModel,
    variant: str = "gla",
    *,
    window_size: int = 64,
    alpha: float = 0.5,
    beta: float = 0.5,
    gate_logit_normalizer: float = 16.0,
    pool: str | int = "identity",
    normalize: bool = False,
    layers: str | Iterable[int] = "all",
    softmax_layers: Iterable[int] = (),
    every: int | None = None,
    inplace: bool = False,
) -> PreTrainedModel:
    """A Liger model with the weights of ``model``: a copy, or the model itself with ``inplace``.

    Args:
        model: a transformers Llama, Mistral, Qwen2 or Qwen3 causal language model with float weights.
        variant, window_size, alpha, beta, gate_logit_normalizer, pool, normalize: as in :class:`LigerConfig`.
        layers: "all" or the indices to convert.
        softmax_layers: indices that keep their attention. every: 8 keeps one layer in eight (7, 15, ...).

    Raises:
        ValueError: as for :func:`tilewright.linearize.convert` and :class:`LigerConfig`.
    """
    config = LigerConfig(variant, window_size, alpha, beta, gate_logit_normalizer, pool, normalize)
    return convert(model, "liger", config, layers=layers, keep=softmax_layers, keep_every=every, inplace=inplace)


def finetune(
    model: PreTrainedModel,
    batches: Batches,
    recipe: LigerRecipe | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    directory: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Tune a converted model: LoRA on the projections, next-token cross-entropy; merged at the end, in place.

    Args:
        model: converted; its weights are changed.
        batches: the batch of a number, inputs and labels int64 [B, T] (``tilewright.data.bytes.ByteWindows``).
        teacher: not used; the recipe is one stage without imitation.
        directory: where an interrupted training keeps its adapters and optimizer, and goes on from.

    Returns:
        steps, tokens and the loss (nats per token) of each step.

    Raises:
        TrainingError: a loss is not finite.
    """
    del teacher
    from tilewright.linearize.tuning import tune_lora

    recipe = LigerRecipe() if recipe is None else recipe
    if not recipe.steps:
        return {"steps": 0, "tokens": 0, "losses": []}
    return tune_lora(
        model,
        batches,
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=recipe.warmup,
        clip=recipe.clip,
        r=recipe.r,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        targets=recipe.target_modules,
        seed=recipe.seed,
        directory=directory,
        progress=progress,
    )
