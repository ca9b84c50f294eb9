# SPDX-License-Identifier: Apache-2.0
"""A linear layer that trains in float and multiplies in integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.formats.ternary import MIN_ABSMEAN, PackedTernary, TernaryFormat, pack_ternary, quantize_ternary
from tilewright.nn.norms import RMSNorm

LEAST_ABSMAX = 1e-5
LARGEST_CODE = 127
# Sums of K products of codes up to 128 are exact in float32 below this.
MAX_EXACT_COLUMNS = 2**24 // 128


class BitLinear(nn.Module):
    """``y = x W^T + b`` with W rounded to {-1, 0, 1} by its mean magnitude, x to INT8 by each token's largest.

    BitNet b1.58 (arXiv 2402.17764, equations 1 to 3, with the per-token activations of its released code)::

        gamma = max(mean |W|, 1e-5)        w = clamp(round(W / gamma), -1, 1)
        s     = max(max |x|, 1e-5) / 127   q = round(x / s)                      half to even
        y     = (q w^T) (s gamma) + b

    While it trains, the latent float weight is rounded anew in each call and gradients go straight through both
    roundings. The products are sums of integers in float32, exact below 131,072 columns, so training and evaluation
    see the integers of :func:`tilewright.ops.ternary_linear`, and the same bits. :meth:`pack_` replaces the latent
    weight by its ternary values, 2 bits or less each; the layer then runs on the kernels and trains no more.

    Args:
        in_features, out_features: K and N.
        bias: add a bias [N].
        norm_eps: normalize x by its root mean square first, with a learned weight [K] (``norm``); None: do not.
            Models of transformers bring their norms along.

    Raises:
        ValueError: a size is below 1, or K too large for exact sums.
    """

    packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"BitLinear: {name} = {size}, needed 1 or more")
        if in_features >= MAX_EXACT_COLUMNS:
            raise ValueError(f"BitLinear: in_features = {in_features}, needed below {MAX_EXACT_COLUMNS} for exact sums")
        self.in_features, self.out_features = in_features, out_features
        self.norm = None if norm_eps is None else RMSNorm(in_features, norm_eps).to(device=device, dtype=dtype)
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._shape = (out_features, in_features)
        self._format: TernaryFormat = "q2"
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights as those of ``nn.Linear``, bias zero."""
        if self.weight is not None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, norm_eps: float | None = None) -> BitLinear:
        """A layer that trains the weight and bias of ``linear``, which it takes over without a copy."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        assert isinstance(linear.weight, nn.Parameter)
        layer.weight, layer.bias = linear.weight, linear.bias
        if norm_eps is not None:
            layer.norm = RMSNorm(linear.in_features, norm_eps).to(linear.weight)
        return layer.train(linear.training)

    @classmethod
    def from_packed(cls, weight: PackedTernary, bias: Tensor | None = None) -> BitLinear:
        """A packed layer from a ternary weight [N, K] and a bias [N] or None."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0])
        if bias is not None:
            if tuple(bias.shape) != weight.shape[:1]:
                raise ValueError(f"BitLinear: bias has shape {list(bias.shape)}, needed [{weight.shape[0]}]")
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer._hold(weight)
        return layer

    @property
    def is_packed(self) -> bool:
        """Whether the weight is held as ternary values alone."""
        return self.weight is None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any floating dtype to [..., N] of the same dtype."""
        y: Tensor
        if self.norm is not None:
            x = self.norm(x)
        if self.weight is None:
            from tilewright.ops import ternary_linear

            y = ternary_linear(x, self.ternary())
        else:
            y = _TernaryProduct.apply(x, self.weight)
        # A rounding of its own, as in the decode engine.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def ternary(self, format: TernaryFormat | None = None) -> PackedTernary:
        """The ternary weight and its scale.

        Args:
            format: a packing of :func:`tilewright.formats.pack_ternary`; None: the one it is held in, else "q2".

        Raises:
            ValueError: the latent weight has a NaN or an infinity.
        """
        if self.weight is None:
            held = PackedTernary(self.packed, self._shape, self._format, self.weight_scale)
            return held if format is None else held.convert(format)
        codes, scale = quantize_ternary(self.weight.detach())
        return pack_ternary(codes.cpu(), format or "q2", scale=scale)

    def pack_(self, format: TernaryFormat = "q2") -> BitLinear:
        """Replace the latent weight by its ternary values, for good; bias and norm are kept, frozen."""
        packed = self.ternary(format)
        if self.weight is not None and self.weight.device.type != "cpu":
            packed = packed.to(self.weight.device)
        self._hold(packed)
        return self

    def _hold(self, packed: PackedTernary) -> None:
        self.weight = None
        self._shape, self._format = packed.shape, packed.format
        self.register_buffer("packed", packed.data)
        self.register_buffer("weight_scale", packed.scale)
        self.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> BitLinear:
        """Moves follow the module; the scale stays float32 and the weight takes the packing of its new device."""
        scale = self.weight_scale if self.is_packed else None
        super()._apply(fn, recurse)
        if scale is not None:
            self.weight_scale = scale.to(self.packed.device)
            moved = PackedTernary(self.packed, self._shape, self._format, self.weight_scale)
            if self.packed.device.type == "cuda" and self._format != "mma2":
                moved = PackedTernary(self.packed.cpu(), self._shape, self._format, self.weight_scale.cpu())
                moved = moved.to(self.packed.device)
            self.packed, self._format = moved.data, moved.format
        return self

    def extra_repr(self) -> str:
        held = f", packed={self._format}" if self.is_packed else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{held}"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values of :func:`tilewright.formats.quantize_ternary` as float32 [N, K] and a scalar, without its checks."""
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=MIN_ABSMEAN)
    return (weight / scale).round_().clamp_(-1, 1), scale


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of :func:`tilewright.ops.quantize_ternary_activation` as float32 [..., K] and scales [..., 1]."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST_ABSMAX) / LARGEST_CODE
    return (x / scale).round_(), scale


class _TernaryProduct(torch.autograd.Function):
    """Both roundings count as the identity: dx = dy (w gamma), dW = dy^T (q s)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (codes, token_scale), (values, scale) = rounded(x), quantized(weight)
        ctx.save_for_backward(codes, token_scale, values, scale)
        ctx.dtypes = x.dtype, weight.dtype
        # As the kernels: the product of the scales is rounded first.
        return ((codes @ values.T) * (token_scale * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        codes, token_scale, values, scale = ctx.saved_tensors
        grad = grads[0].float()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = ((grad * scale) @ values).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            d_weight = ((grad * token_scale).flatten(0, -2).T @ codes.flatten(0, -2)).to(ctx.dtypes[1])
        return d_x, d_weight
