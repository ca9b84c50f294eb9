# SPDX-License-Identifier: Apache-2.0
"""One vector a text and module: a model run over texts, its activations pooled over each text's tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilewright.capture import attach, resolve

Texts = Sequence[str] | Sequence[Sequence[int]]
Pooling = Literal["mean", "last", "max"]
POOLINGS = ("mean", "last", "max")
Change = Callable[[str, Tensor, Tensor], Tensor]
"""(name, activation [B, T, C], mask bool [B, T]) -> the activation that takes its place."""


def encode(texts: Texts, tokenizer: Any, what: str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` int64 [B, T], shorter texts padded behind.

    Raises:
        ValueError: there is no text, one has no token, or words came without a tokenizer.
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"{what}: a list with at least one text is needed, got {texts!r:.60}")
    rows: list[list[int]] = []
    for index, text in enumerate(texts):
        if isinstance(text, str) and tokenizer is None:
            raise ValueError(f"{what}: texts need a tokenizer; pass tokenizer=..., or token ids in place of texts")
        ids: list[Any] = tokenizer(text)["input_ids"] if isinstance(text, str) else list(text)
        if not ids:
            raise ValueError(f"{what}: text {index} has no token; leave it out")
        rows.append([int(i) for i in ids])
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": padded, "attention_mask": mask}


def take(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {key: value[rows] for key, value in batch.items()}


def pool(x: Tensor, mask: Tensor, how: Pooling) -> Tensor:
    """[B, T, C] to [B, C] over the tokens where ``mask`` [B, T] is true, in float32 or wider."""
    x = x if x.dtype == torch.float64 else x.float()
    if how == "mean":
        kept = mask[..., None].to(x)
        return (x * kept).sum(1) / kept.sum(1)
    if how == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return x[torch.arange(len(x), device=x.device), last]


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the model's longest list of blocks, in order; none for a model without such a list."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return []
    name, longest = max(lists, key=lambda one: len(one[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(longest)]


def select(model: nn.Module, modules: str | Sequence[str], layers: Iterable[int] | None) -> list[str]:
    """Names of the modules whose outputs are mapped, in the order of ``named_modules()``; inputs end in ``@input``.

    Raises:
        ValueError: nothing is left, or one place is named twice.
    """
    blocks = blocks_of(model)
    if modules == "block":
        names = [name for name, _ in blocks]
    elif modules == "norm":
        names = [f"{at}.{n}" for at, block in blocks for n, part in block.named_children() if _is_norm(part)]
    else:
        sites = [modules] if isinstance(modules, str) else list(modules)
        points = [point for site in sites for point in resolve(model, site)]
        names = [p.module_name if p.side == "output" else p.name for p in points]
    if len(set(names)) != len(names):
        raise ValueError(f"modules={modules!r}: {next(n for n in names if names.count(n) > 1)} is named twice")
    if layers is not None:
        wanted = set(layers)
        names = [name for name in names if (found := re.search(r"\.(\d+)(\.|$|@)", name)) and int(found[1]) in wanted]
    if not names:
        raise ValueError(
            f"modules={modules!r}, layers={layers!r} match nothing in {type(model).__name__}; name modules by pattern, "
            "for example 'model.layers.*.input_layernorm'"
        )
    return names


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


class _Done(Exception):
    """The last wanted activation is there: the rest of the forward pass is not needed."""


class Collector:
    """While the context lives, calls of it run the model and give pooled activations, in the order they are computed.

    Backward passes through activations (and recomputation of checkpointed blocks) belong inside the context, where the
    changes are still in place.

    Args:
        names: places, of :func:`select`.
        change: what takes an activation's place; pooled is what it returns. None: nothing changes.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], pooling: Pooling, change: Change | None = None) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}, needed one of {', '.join(map(repr, POOLINGS))}")
        self.model, self.names, self.pooling, self.change = model, list(names), pooling, change
        self._seen: dict[str, Tensor] = {}
        self._mask = torch.ones(0)
        self._running = False
        self._remove: Callable[[], None] = lambda: None

    def __enter__(self) -> Collector:
        self._remove = attach(self.model, {name: self._tap(name) for name in self.names})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _tap(self, name: str) -> Callable[[Tensor], Tensor]:
        def tap(x: Tensor) -> Tensor:
            if x.dim() != 3 or x.shape[:2] != self._mask.shape:
                raise ValueError(f"{name} gives {list(x.shape)}, needed [B, T, C] with B, T = {list(self._mask.shape)}")
            y = x if self.change is None else self.change(name, x, self._mask)
            pooled = pool(y, self._mask, self.pooling)
            # A checkpointed block runs again in the backward pass; what it gave the first time counts.
            if self._running:
                self._seen.setdefault(name, pooled)
                if len(self._seen) == len(self.names):
                    raise _Done
            return y

        return tap

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pooled activations [B, C] by name.

        Raises:
            ValueError: a module did not run, or an activation is NaN or infinite (named).
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = {key: value.to(device) for key, value in batch.items()}
        self._seen, self._mask, self._running = {}, batch["attention_mask"].bool(), True
        extra = {"use_cache": False} if hasattr(self.model, "config") else {}
        try:
            self.model(**batch, **extra)
        except _Done:
            pass
        finally:
            self._running = False
        seen, self._seen = self._seen, {}
        for name in self.names:
            if name not in seen:
                raise ValueError(f"{name}: the module did not run on these texts, so it has no activation")
        return seen


def require_finite(seen: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first place with NaN or infinite activations."""
    for name, x in seen.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: activations hold NaN or infinite values; the model or its input is damaged")
