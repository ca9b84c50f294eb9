# SPDX-License-Identifier: Apache-2.0
"""A linear layer with INT4 weights whose activations are rounded to 8 bits (FireQ, arXiv 2505.20839)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilewright import ops
from tilewright.formats.int4 import Int4Weight, PackedInt4, quantize_int4

Activation = Literal["fp8", "int8"]
Mode = Literal["exact", "fold"]


class W4A8Linear(nn.Module):
    """``y = x W^T + b`` with W in INT4 and x rounded to FP8 e4m3 or INT8, with one scale a token.

    The weight is held once, in the kernels' packed form (buffer ``packed``, uint8), so moving the module to
    another float dtype does not touch it. Moved to another kind of device, it is packed again for the kernels
    there. ``state_dict`` holds the CPU's blob, wherever the layer is; the portable canonical form on disk is what
    :func:`tilewright.models.save` writes.

    Args:
        weight: Int4Weight [N, K].
        bias: float [N] or None.
        act: "fp8" or "int8", the grid of the activations.
        mode: "exact" or "fold" (see :func:`tilewright.ops.int4_fp8_linear`); "fold" needs act "fp8".
        scale_group: columns of x that share a scale instead, a multiple of the weight's group; needs act "int8".
        input_gradient: keep the canonical weight too, so that a gradient flows to x (straight through the
            rounding of x, through the dequantized weight); without it a gradient is refused.

    Raises:
        ValueError: act or mode is another word, the two do not fit, or scale_group or the bias's shape does not.
    """

    packed: Tensor

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None = None,
        act: Activation = "fp8",
        mode: Mode = "exact",
        *,
        scale_group: int | None = None,
        input_gradient: bool = False,
    ) -> None:
        super().__init__()
        if act not in ("fp8", "int8"):
            raise ValueError(f"W4A8Linear: act = {act!r}, needed 'fp8' or 'int8'")
        if mode not in ("exact", "fold") or (mode == "fold" and act != "fp8"):
            raise ValueError(f"W4A8Linear: mode = {mode!r} with act = {act!r}; needed 'exact', or 'fold' with 'fp8'")
        if mode == "fold" and not weight.symmetric:
            raise ValueError("W4A8Linear: mode = 'fold' needs a symmetric weight (offsets None); use mode 'exact'")
        if scale_group is not None and (act != "int8" or scale_group < 1 or scale_group % weight.group_size):
            raise ValueError(
                f"W4A8Linear: scale_group = {scale_group} with act = {act!r}; needed None, or a multiple of the "
                f"weight's group {weight.group_size} with act = 'int8'"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"W4A8Linear: bias has shape {list(bias.shape)}, needed [{weight.shape[0]}]")
        self.out_features, self.in_features = weight.shape
        self.act: Activation = act
        self.mode: Mode = mode
        self.group_size, self.scale_group = weight.group_size, scale_group
        packed = weight.pack()
        self.register_buffer("packed", packed.data)
        self._layout = packed.layout
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._canonical = weight if input_gradient else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        scale_dtype: torch.dtype = torch.bfloat16,
        *,
        symmetric: bool = True,
        **options: Any,
    ) -> W4A8Linear:
        """Round the weight of a float layer to INT4 (nearest) and wrap it; ``options`` go to the constructor."""
        weight = quantize_int4(linear.weight, group_size, scale_dtype, symmetric=symmetric)
        return cls(weight, linear.bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any floating dtype to [..., N] of the same dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            if self._canonical is None:
                raise RuntimeError(
                    "W4A8Linear: x requires a gradient, but the weight is held in packed form only; "
                    "build the layer with input_gradient=True, or call it under torch.no_grad()"
                )
            y: Tensor = _StraightThrough.apply(x, self)
            return y
        return self._run(x)

    def _packed(self) -> PackedInt4:
        return PackedInt4(self.packed, (self.out_features, self.in_features), self._layout)

    def _apply(self, fn: Any, recurse: bool = True) -> W4A8Linear:
        """Moves follow the module, and the weight takes the layout of the device that it comes to."""
        super()._apply(fn, recurse)
        if self.packed.device.type in ("cpu", "cuda"):
            packed = self._packed().to(self.packed.device)
            self.packed, self._layout = packed.data, packed.layout
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = self._packed().repacked("cpu").data

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name, here = f"{prefix}packed", self.packed.device
        if self._layout != 0 and name in state_dict:
            blob = PackedInt4(state_dict[name], (self.out_features, self.in_features)).repacked("cuda")
            state_dict = {**state_dict, name: blob.data}
            self._layout = blob.layout
            if blob.data.shape != self.packed.shape:  # another group or scale, or a -8: another number of bytes
                self.packed = self.packed.new_empty(blob.data.shape, device=here)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _run(self, x: Tensor) -> Tensor:
        packed = self._packed()
        if self.act == "int8":
            return ops.int4_int8_linear(x, packed, self.bias, scale_group=self.scale_group)
        return ops.int4_fp8_linear(x, packed, self.bias, mode=self.mode)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"act={self.act}, mode={self.mode}, group_size={self.group_size}, scale_group={self.scale_group}"
        )


class _StraightThrough(torch.autograd.Function):
    """The rounding of x counts as the identity: dx = dy W with W dequantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: W4A8Linear) -> Tensor:
        ctx.layer = layer
        return layer._run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer._canonical
        return grads[0] @ weight.dequantize(grads[0].dtype).to(grads[0].device), None
