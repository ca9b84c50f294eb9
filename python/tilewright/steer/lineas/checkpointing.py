# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of a model's blocks, while a context lives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tilewright.steer.activations import blocks_of


@contextlib.contextmanager
def checkpointed(model: nn.Module, last: str) -> Iterator[None]:
    """Blocks keep only their inputs and run again in the backward pass.

    last: the place behind which a forward pass is broken off; its block is left as it is.
    """
    changed = [block for name, block in blocks_of(model) if not f"{last}.".startswith(f"{name}.")]
    for block in changed:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
