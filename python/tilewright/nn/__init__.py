# SPDX-License-Identifier: Apache-2.0
"""Layers built from the operators: low-bit linears, token mixers, and language models that mix them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright.nn.accelerate import Acceleration, accelerate
from tilewright.nn.bitnet.linear import BitLinear
from tilewright.nn.cats_mlp import CATSMLP
from tilewright.nn.linear import W4A8Linear
from tilewright.nn.matrix import BFloat16Linear, Int4Embedding, Int8Linear, PackedEmbedding, TernaryEmbedding
from tilewright.nn.token import GatedMLP, RMSNorm, RotaryAngles

if TYPE_CHECKING:
    from tilewright.nn.bitnet import build_bitnet, pack_bitlinears, replace_with_bitlinear
    from tilewright.nn.cache import MixerCache
    from tilewright.nn.delta_rule import DeltaNet, GatedDeltaNet, KimiDeltaAttention
    from tilewright.nn.gated_linear_attention import HGRN2, GatedLinearAttention
    from tilewright.nn.hedgehog import HedgehogFeatureMap, HedgehogLinearAttention, hedgehog_attention
    from tilewright.nn.hgrn import HGRN
    from tilewright.nn.hybrid_linear_attention import HybridConfig, HybridForCausalLM, build_hybrid
    from tilewright.nn.lightning_attention import LightningAttention, MultiScaleRetention
    from tilewright.nn.linear_attention import LinearAttention
    from tilewright.nn.local_linear_attention import LocalLinearAttention
    from tilewright.nn.mom import MomAttention, MomConfig, MomForCausalLM, load_balancing_loss, mom_attention, mom_route
    from tilewright.nn.short_convolution import ShortConvolution
    from tilewright.nn.softmax_attention import SlidingWindowAttention, SoftmaxAttention

__all__ = [
    "CATSMLP",
    "HGRN",
    "HGRN2",
    "Acceleration",
    "BFloat16Linear",
    "BitLinear",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedMLP",
    "HedgehogFeatureMap",
    "HedgehogLinearAttention",
    "HybridConfig",
    "HybridForCausalLM",
    "Int4Embedding",
    "Int8Linear",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "LocalLinearAttention",
    "MixerCache",
    "MomAttention",
    "MomConfig",
    "MomForCausalLM",
    "MultiScaleRetention",
    "PackedEmbedding",
    "RMSNorm",
    "RotaryAngles",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "TernaryEmbedding",
    "W4A8Linear",
    "accelerate",
    "build_bitnet",
    "build_hybrid",
    "hedgehog_attention",
    "load_balancing_loss",
    "mom_attention",
    "mom_route",
    "pack_bitlinears",
    "replace_with_bitlinear",
]

# Token mixers and what is built of them, imported on use.
_LAZY = {
    "DeltaNet": "delta_rule",
    "GatedDeltaNet": "delta_rule",
    "GatedLinearAttention": "gated_linear_attention",
    "HGRN": "hgrn",
    "HGRN2": "gated_linear_attention",
    "HedgehogFeatureMap": "hedgehog",
    "HedgehogLinearAttention": "hedgehog",
    "HybridConfig": "hybrid_linear_attention",
    "HybridForCausalLM": "hybrid_linear_attention",
    "KimiDeltaAttention": "delta_rule",
    "LightningAttention": "lightning_attention",
    "LinearAttention": "linear_attention",
    "LocalLinearAttention": "local_linear_attention",
    "MixerCache": "cache",
    "MomAttention": "mom",
    "MomConfig": "mom",
    "MomForCausalLM": "mom",
    "MultiScaleRetention": "lightning_attention",
    "ShortConvolution": "short_convolution",
    "SlidingWindowAttention": "softmax_attention",
    "SoftmaxAttention": "softmax_attention",
    "build_bitnet": "bitnet",
    "build_hybrid": "hybrid_linear_attention",
    "hedgehog_attention": "hedgehog",
    "load_balancing_loss": "mom",
    "mom_attention": "mom",
    "mom_route": "mom",
    "pack_bitlinears": "bitnet",
    "replace_with_bitlinear": "bitnet",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
