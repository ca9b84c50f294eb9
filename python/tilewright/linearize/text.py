# SPDX-License-Identifier: Apache-2.0
"""Tokens of real text: what a conversion is trained on and what it is measured on never share a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import data
from tilewright.data.bytes import DOCUMENTATION, documentation
from tilewright.evaluate import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = (*data.CORPORA, DOCUMENTATION)
"""Texts by name; any UTF-8 file may be named too."""


def source_text(source: str, part: str) -> str:
    """The text called ``source`` (:data:`SOURCES`) or the UTF-8 file of that name, which has one part only.

    part: "calibration" for training, "evaluation" for held-out text.

    Raises:
        ValueError: an unknown part, or a file that is not UTF-8. FileNotFoundError: there is no such text.
    """
    if source == DOCUMENTATION:
        return documentation(part)
    if source in data.CORPORA:
        return data.corpus(source, part)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file, and none of the texts {', '.join(SOURCES)}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise ValueError(f"{path} is not valid UTF-8 (byte {wrong.start}); convert it to UTF-8") from wrong


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: str | Sequence[str], part: str, *, max_tokens: int | None = None
) -> Tensor:
    """Tokens int64 [T] of one or several texts after one another; ``max_tokens`` of each at most.

    :class:`tilewright.data.bytes.ByteWindows` makes numbered training batches of them, and
    :func:`tilewright.evaluate.perplexity` measures on them.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    return torch.cat([tokenize(tokenizer, source_text(name, part), max_tokens=max_tokens) for name in names])
