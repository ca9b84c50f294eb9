# SPDX-License-Identifier: Apache-2.0
"""A linear layer in integers: activations with a row scale, columns folded into the weight, INT8 product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewright.quantize.crossquant.config import ALPHA, require_alpha, require_bits
from tilewright.quantize.crossquant.scales import _normalised, power

INT8_TOP = 127
# 1024 products of at most 127^2 stay below 2^24, so a float32 sum of them is exact.
_EXACT_COLUMNS = 1024
_KERNEL_FLOOR = 1e-5
# 256 KB of float32: a block and its codes stay in a core's second-level cache.
_BLOCK_VALUES = 1 << 16


def weight_of(linear: nn.Module) -> Tensor:
    """float32 weight [O, I] of a Linear, or of a transposed one (transformers' Conv1D)."""
    weight = linear.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{type(linear).__name__} has no matrix weight; a linear layer is needed")
    return (weight.T if type(linear).__name__ == "Conv1D" else weight).detach().float()


def quantize_weight(weight: Tensor, bits: int = 8, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric codes int8 [O, I] and scales float32 [O, G]: G = 1, or one a group of ``group_size`` columns."""
    width = weight.shape[1]
    step = group_size or width
    top = 2 ** (bits - 1) - 1
    columns = nn.functional.pad(weight.float(), (0, -width % step)).unflatten(1, (-1, step))
    scale = power(columns.abs().amax(-1), 1.0) / top
    codes = (columns / scale[..., None]).round_().clamp_(-top, top).to(torch.int8)
    return codes.flatten(1)[:, :width].contiguous(), scale


def dequantize_weight(codes: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    """Inverse of :func:`quantize_weight`, float32 [O, I]."""
    wide = scale if group_size is None else scale.repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    return codes.float() * wide


def quantize_rows(x: Tensor, bits: int = 8, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-token codes int8 [T, I] and scales float32 [T, 1] of float32 x [T, I], its columns times ``inverse`` first.

    NaN scale and codes 0 where a token is not finite.
    """
    if bits == 8 and x.device.type == "cpu" and x.numel():
        codes, scale = _by_blocks(x, inverse)
        # The kernel's scale has a floor, which a row of tiny values must not get.
        if not bool((scale <= _KERNEL_FLOOR / INT8_TOP).any()):
            return codes, scale[:, None]
    x = x if inverse is None else x * inverse
    top = 2 ** (bits - 1) - 1
    largest = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(largest)
    largest = power(torch.where(finite, largest, torch.ones_like(largest)), 1.0)
    codes = torch.where(finite, x * (top / largest), torch.zeros_like(x)).round_().clamp_(-top, top)
    return codes.to(torch.int8), torch.where(finite, largest / top, torch.full_like(largest, torch.nan))


def _by_blocks(x: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [T, I] and scales [T] by the native quantizer, in blocks whose product with ``inverse`` stays in cache."""
    from tilewright.ops import quantize_ternary_activation

    if inverse is None:
        return quantize_ternary_activation(x)
    rows = max(1, _BLOCK_VALUES // x.shape[1])
    if len(x) <= rows:
        return quantize_ternary_activation(x * inverse)
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x))
    block = x.new_empty(rows, x.shape[1])
    for some, its_codes, its_scale in zip(x.split(rows), codes.split(rows), scale.split(rows), strict=True):
        product = torch.mul(some, inverse, out=block[: len(some)])
        found = quantize_ternary_activation(product)
        its_codes.copy_(found[0])
        its_scale.copy_(found[1])
    return codes, scale


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [T, I] @ b [O, I].T of int8 codes, exact, float32 [T, O] (each value is rounded once where above 2^24)."""
    # torch._int_mm (2.13) returns unwritten memory for a single column on both sides.
    if a.device.type == "cpu" and a.shape[1] > 1 and torch.cpu._is_vnni_supported():
        return torch._int_mm(a, b.T).float()
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_EXACT_COLUMNS, 1), b.split(_EXACT_COLUMNS, 1), strict=True):
        total += left.float() @ right.float().T
    return total.float()


class CrossQuantLinear(nn.Module):
    """y = x W^T + b with INT8 or INT4 weights and 2 to 8 bit activations. Inference only.

    The stored weight is round(W diag(u)), u the normalised c^(1-alpha); an input comes divided by u already
    (``folded``) or is divided here. Row scale: see ``mode`` of :func:`tilewright.quantize.crossquant.crossquant`.
    """

    codes: Tensor
    weight_scale: Tensor
    factor: Tensor
    inverse: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor,
        *,
        w_bits: int = 8,
        group_size: int = 128,
        a_bits: int = 8,
        alpha: float = ALPHA,
        mode: str = "tight",
        gain: float = 1.0,
        folded: bool = False,
    ) -> None:
        """weight: float [O, I], not folded yet. factor: u [I]. gain: g in c^(1-alpha) = g u (for "static")."""
        super().__init__()
        require_bits("CrossQuantLinear: a_bits", a_bits)
        require_alpha("CrossQuantLinear: alpha", alpha)
        if w_bits not in (4, 8):
            raise ValueError(f"CrossQuantLinear: w_bits={w_bits!r}; 8 or 4 is needed")
        if mode not in ("tight", "static"):
            raise ValueError(f"CrossQuantLinear: mode={mode!r}; 'tight' or 'static' is needed")
        if tuple(factor.shape) != (weight.shape[1],):
            raise ValueError(f"CrossQuantLinear: factor has shape {list(factor.shape)}, [{weight.shape[1]}] is needed")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("CrossQuantLinear: the weight holds NaN or infinite values")
        self.out_features, self.in_features = weight.shape
        self.w_bits, self.a_bits, self.alpha, self.mode = w_bits, a_bits, alpha, mode
        self.group_size = group_size if w_bits == 4 else None
        self.gain, self.folded = gain, folded
        codes, scale = quantize_weight(weight.float() * factor.float(), w_bits, self.group_size)
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("factor", factor.float().clone())
        self.register_buffer("inverse", 1 / factor.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        col_absmax: Tensor,
        w_bits: int = 8,
        group_size: int = 128,
        a_bits: int = 8,
        alpha: float = ALPHA,
        mode: str = "tight",
        fold_into: nn.Module | None = None,
    ) -> CrossQuantLinear:
        """A linear layer with calibrated column maxima ``col_absmax`` [I] of its input.

        fold_into: the norm or linear whose output is this layer's input and nobody else's; its weight (and bias) is
            divided by u in place, so that the division costs nothing.

        Raises:
            ValueError: a setting, shape or value is wrong; nothing was changed then.
        """
        weight = weight_of(linear)
        if tuple(col_absmax.shape) != (weight.shape[1],):
            raise ValueError(f"col_absmax has shape {list(col_absmax.shape)}, [{weight.shape[1]}] is needed")
        require_alpha("CrossQuantLinear: alpha", alpha)
        factor, gain = _normalised(col_absmax, alpha)
        bias = getattr(linear, "bias", None)
        made = cls(weight, bias, factor, w_bits=w_bits, group_size=group_size, a_bits=a_bits, alpha=alpha, mode=mode,
                   gain=gain, folded=fold_into is not None)  # fmt: skip
        if fold_into is not None:
            divide_outputs_(fold_into, factor)
        return made

    def extra_repr(self) -> str:
        """Sizes, bits and form, for printing."""
        where = "folded" if self.folded else "online"
        return (
            f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, a_bits={self.a_bits}, "
            f"alpha={self.alpha:g}, mode={self.mode}, {where}"
        )

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        rows = x.reshape(-1, self.in_features).float()
        inverse = None if self.folded else self.inverse
        if self.mode == "static":
            codes, scale = self._static(rows if inverse is None else rows * inverse)
        else:
            codes, scale = quantize_rows(rows, self.a_bits, inverse)
        y = self._product(codes).mul_(scale)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _static(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes with the row scale g t^alpha / Qmax, t the largest magnitude before the columns were divided."""
        top = 2 ** (self.a_bits - 1) - 1
        largest = (rows * self.factor).abs().amax(-1, keepdim=True)
        finite = torch.isfinite(largest)
        scale = power(torch.where(finite, largest, torch.ones_like(largest)), self.alpha) * (self.gain / top)
        codes = torch.where(finite, rows / scale, torch.zeros_like(rows)).round_().clamp_(-top, top)
        return codes.to(torch.int8), torch.where(finite, scale, torch.full_like(scale, torch.nan))

    def _product(self, codes: Tensor) -> Tensor:
        """codes @ (weight codes * weight scale).T, float32 [T, O]."""
        if self.group_size is None:
            return int_matmul(codes, self.codes).mul_(self.weight_scale.T)
        y = torch.zeros(len(codes), self.out_features, device=codes.device)
        groups = zip(codes.split(self.group_size, 1), self.codes.split(self.group_size, 1), strict=True)
        for i, (left, right) in enumerate(groups):
            y += int_matmul(left.contiguous(), right.contiguous()).mul_(self.weight_scale[:, i])
        return y


@torch.no_grad()
def divide_outputs_(producer: nn.Module, factor: Tensor, rows: slice | None = None) -> None:
    """Divide the outputs of a norm or linear by ``factor``, in its weight and bias.

    rows: only these outputs (of a fused projection).

    Raises:
        ValueError: the module has no weight with so many outputs.
    """
    parts = [part for part in (getattr(producer, "weight", None), getattr(producer, "bias", None)) if part is not None]
    rows = rows or slice(None)
    if not parts:
        raise ValueError(f"{type(producer).__name__} has no weight to fold into; {len(factor)} outputs are needed")
    for part in parts:
        turned = part.T if part.dim() == 2 and type(producer).__name__ == "Conv1D" else part
        if len(turned[rows]) != len(factor):
            raise ValueError(
                f"{type(producer).__name__} has a weight or bias of shape {list(part.shape)}; {len(factor)} outputs "
                "are needed to fold into it"
            )
    for part in parts:
        turned = part.T if part.dim() == 2 and type(producer).__name__ == "Conv1D" else part
        turned[rows] /= (factor if part.dim() == 1 else factor[:, None]).to(part)
