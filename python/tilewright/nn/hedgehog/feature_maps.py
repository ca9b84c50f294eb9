# SPDX-License-Identifier: Apache-2.0
"""Feature maps phi, so that ``phi(q) . phi(k)`` takes the place of ``exp(q . k)`` (Hedgehog, arXiv 2402.04347).

Every map takes ``[..., H, D]`` and returns positive (or zero) features ``[..., H, F]`` in float32, or in float64 when
the input is: the denominators of linear attention grow with the length, which 16-bit floats cannot follow.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

Activation = Literal["softmax_dim", "exp_dim", "exp", "joint_softmax"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SMALLEST = 1e-12
"""Lower clamp of softmax features: the weights stay positive, so that no row divides by zero."""
CAP = {torch.float16: 10.0, torch.bfloat16: 10.0, torch.float32: 15.0, torch.float64: 300.0}
"""Largest |y| that the plain exponential sees, by dtype of the input."""


_KEY_GAIN, _LARGEST_EXPONENT = 30.0, 80.0  # of Performer's keys; exp(80) a million times still is a float32


class FeatureMap(nn.Module):
    """What attention needs to know of a map.

    head_dim: D, features of the input. feature_size: F, features of the output. num_heads: heads with a map of
    their own, or None for one that all heads share.
    """

    def __init__(self, head_dim: int, feature_size: int, num_heads: int | None) -> None:
        super().__init__()
        if head_dim < 1 or feature_size < 1 or (num_heads is not None and num_heads < 1):
            raise ValueError(
                f"{type(self).__name__}: head_dim={head_dim}, features {feature_size}, num_heads={num_heads}; "
                "all must be at least 1"
            )
        self.head_dim, self.feature_size, self.num_heads = head_dim, feature_size, num_heads

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.head_dim or (self.num_heads or x.shape[-2]) != x.shape[-2]:
            heads = "H" if self.num_heads is None else self.num_heads
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}, needed [..., {heads}, {self.head_dim}]"
            )
        return x if x.dtype == torch.float64 else x.float()


class HedgehogFeatureMap(FeatureMap):
    """The trainable map of Hedgehog (arXiv 2402.04347, section 4.1): ``y = x W + b``, then positive features of +-y.

    ============== =====================================================================
    softmax_dim    ``[softmax(y), softmax(-y)]``, clamped at 1e-12 (the usual form)
    exp_dim        ``[exp(y - max y), exp(min y - y)]``
    exp            ``[exp(y), exp(-y)]``, the definition; |y| is capped at 15 (float64: 300, 16 bits: 10)
    joint_softmax  ``softmax([2y, -2y])`` over both halves at once (a different function)
    ============== =====================================================================

    exp and exp_dim differ by a factor of the token, which cancels for queries and does not for keys. The teacher's
    ``D^-1/2`` is not applied; ``init="scaled"`` puts ``D^-1/4`` into the initial W of a map, for both of a pair.

    Args:
        head_dim: D.
        feature_dim: rows of y, D unless given; the map has twice as many features.
        num_heads: heads, each with its own W [D, feature_dim]; None shares one W among all.
        activation: one of the table.
        bias: learn b [H, feature_dim] too, initially 0.
        init: "identity", "scaled" (``D^-1/4 I``), or a number t (``t I``).

    Shape: ``[..., H, D]`` to ``[..., H, 2 feature_dim]``.

    Raises:
        ValueError: an option is none of its words, a size is below 1, or the input does not fit.
    """

    def __init__(
        self,
        head_dim: int,
        feature_dim: int | None = None,
        num_heads: int | None = None,
        activation: Activation = "softmax_dim",
        bias: bool = False,
        init: Literal["identity", "scaled"] | float = "identity",
    ) -> None:
        feature_dim = head_dim if feature_dim is None else feature_dim
        super().__init__(head_dim, 2 * feature_dim, num_heads)
        if activation not in ACTIVATIONS:
            raise ValueError(f"HedgehogFeatureMap: activation={activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        if isinstance(init, str) and init not in ("identity", "scaled"):
            raise ValueError(f"HedgehogFeatureMap: init={init!r}; choose 'identity', 'scaled' or a number")
        self.activation: Activation = activation
        self.init = init
        heads = 1 if num_heads is None else num_heads
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))
        self.bias = nn.Parameter(torch.empty(heads, feature_dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W = t I (rectangular where feature_dim differs from D), b = 0."""
        t = {"identity": 1.0, "scaled": self.head_dim**-0.25}.get(cast(str, self.init), self.init)
        self.weight.copy_(float(t) * torch.eye(*self.weight.shape[1:], device=self.weight.device))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        cap = CAP.get(x.dtype, 15.0)
        x = self._checked(x)
        # [..., H, 1, D] @ [H, D, F]: one small matrix product for each head
        y = torch.einsum("...hd,hdf->...hf", x, self._per_head(self.weight, x))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return _activate(y, self.activation, cap)

    def _per_head(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight.to(x.dtype).expand(x.shape[-2], -1, -1)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, feature_dim={self.feature_size // 2}, num_heads={self.num_heads}, "
            f"activation={self.activation!r}, bias={self.bias is not None}"
        )


def _activate(y: Tensor, activation: Activation, cap: float) -> Tensor:
    if activation == "softmax_dim":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp_min(SMALLEST)
    if activation == "joint_softmax":
        return torch.cat((2 * y, -2 * y), -1).softmax(-1).clamp_min(SMALLEST)
    if activation == "exp":
        y = y.clamp(-cap, cap)
        return torch.cat((y, -y), -1).exp()
    # The shifts stay in the graph: on keys they are part of the function.
    return torch.cat((y - y.amax(-1, keepdim=True), y.amin(-1, keepdim=True) - y), -1).exp()


class ELUFeatureMap(FeatureMap):
    """``phi(x) = elu(x) + 1`` (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7): [..., H, D] to [..., H, D]."""

    def __init__(self, head_dim: int, num_heads: int | None = None) -> None:
        super().__init__(head_dim, head_dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(self._checked(x)) + 1


class ReLUFeatureMap(FeatureMap):
    """``phi(x) = max(x, 0)`` (Kasai et al., arXiv 2103.13076, without its learned matrix): [..., H, D] to [..., H, D].

    A query and a key without a common positive channel have weight 0.
    """

    def __init__(self, head_dim: int, num_heads: int | None = None) -> None:
        super().__init__(head_dim, head_dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return self._checked(x).relu()


class PerformerFeatureMap(FeatureMap):
    """Positive random features of the softmax kernel (Performer, arXiv 2009.14794, lemma 1).

    ``phi(x)_m = exp(w_m . u - |u|^2 / 2) M^-1/2`` with ``u = D^-1/4 x`` and w_m normal, orthogonal within blocks of D,
    so that the mean of ``phi(q) . phi(k)`` over draws of w is ``exp(q . k D^-1/2)``. Every query's features are divided
    by their largest, and those of keys, which long keys make tiny, multiplied by ``exp(30)`` to stay far above the eps
    of a denominator; both factors cancel in normalised weights.

    Args:
        head_dim: D. num_features: M, 2 D unless given (the size of Hedgehog's features).
        num_heads: kept for the interface; all heads share the directions.
        role: "query" or "key".
        seed: of the directions; a pair must use the same.
    """

    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        num_heads: int | None = None,
        role: Literal["query", "key"] = "query",
        seed: int = 0,
    ) -> None:
        num_features = 2 * head_dim if num_features is None else num_features
        super().__init__(head_dim, num_features, num_heads)
        if role not in ("query", "key"):
            raise ValueError(f"PerformerFeatureMap: role={role!r}; choose 'query' or 'key'")
        self.role = role
        self.register_buffer("directions", _orthogonal_directions(num_features, head_dim, seed))

    def forward(self, x: Tensor) -> Tensor:
        u = self._checked(x) * self.head_dim**-0.25
        exponent = u @ self.directions.to(u.dtype).T - u.square().sum(-1, keepdim=True) / 2
        if self.role == "query":
            exponent = exponent - exponent.detach().amax(-1, keepdim=True)
        else:
            exponent = (exponent + _KEY_GAIN).clamp_max(_LARGEST_EXPONENT)
        return exponent.exp() * self.feature_size**-0.5


def _orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """float32 [count, dim]: rows orthogonal within each block of dim, with the lengths of normal vectors."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, count, dim):
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        basis, triangle = torch.linalg.qr(square)
        # With a positive diagonal the factorization is unique and its basis uniformly distributed.
        blocks.append((basis * triangle.diagonal().sign())[: min(dim, count - start)])
    lengths = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks) * lengths).float()


def apply_feature_map(phi: nn.Module, x: Tensor, heads: int) -> Tensor:
    """phi(x) for ``heads`` heads, where x [..., Hx, D] has fewer and each serves a group (grouped-query attention).

    A map with as many heads as there are queries sees every key once for each query head (the reference's form); one
    with Hx heads, or a shared one, sees it once and its features are repeated.

    Raises:
        ValueError: heads is no multiple of Hx.
    """
    groups, rest = divmod(heads, max(x.shape[-2], 1))
    if rest or groups == 0:
        raise ValueError(f"k has {x.shape[-2]} heads, q has {heads}; the heads of q must be a multiple of those of k")
    own_map = groups == 1 or getattr(phi, "num_heads", None) == heads
    features: Tensor = phi(x.repeat_interleave(groups, -2) if own_map and groups > 1 else x)
    return features if own_map else features.repeat_interleave(groups, -2)
