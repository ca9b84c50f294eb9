# SPDX-License-Identifier: Apache-2.0
"""BitNet language models to train: transformers' architecture over layers that round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tilewright.nn.bitnet.convert import replace_with_bitlinear

if TYPE_CHECKING:
    from transformers import BitNetForCausalLM

HiddenActivation = Literal["silu", "relu2"]


def build_bitnet(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_position_embeddings: int = 2048,
    hidden_act: HiddenActivation = "silu",
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
    ternary: bool = True,
) -> BitNetForCausalLM:
    """A randomly initialized transformers BitNetForCausalLM whose decoder linears are :class:`BitLinear`.

    RMSNorm stands before every linear (two norms a layer, and a sub-norm each before the output and the down
    projection), as in BitNet b1.58; embedding and head stay float. Weights are drawn from torch's global generator.

    Args:
        hidden_act: "silu" (SwiGLU, as bitnet_b1_58-large) or "relu2" (squared ReLU, as BitNet b1.58 2B4T).
        ternary: False keeps ``nn.Linear``: the float model of the same shape.

    Raises:
        ValueError: the heads do not divide the width, or another value does not fit.
    """
    from transformers import BitNetConfig, BitNetForCausalLM

    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size = {hidden_size}: a multiple of 2 * num_heads = {2 * num_heads} is needed")
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_kv_heads = {kv_heads}: a divisor of num_heads = {num_heads} is needed")
    if hidden_act not in ("silu", "relu2"):
        raise ValueError(f"hidden_act = {hidden_act!r}, needed 'silu' or 'relu2'")
    config = BitNetConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=kv_heads,
        hidden_act=hidden_act,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = BitNetForCausalLM(config)
    if ternary:
        replace_with_bitlinear(model)
    return model.float()
