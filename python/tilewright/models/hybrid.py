# SPDX-License-Identifier: Apache-2.0
"""Folders that hold a hybrid linear-attention language model: transformers' files, with a tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright._files import sync
from tilewright.models.errors import CheckpointError
from tilewright.models.tokenizer import directory_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tilewright.nn import HybridForCausalLM

MODEL_TYPE = "tilewright_hybrid"
# A linear layer has no longest sequence; where none is stated, this is what a session may hold.
LONGEST = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a session asks of a model: the longest sequence, and the tokens that end a text."""

    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


@dataclass(eq=False)
class HybridLanguageModel:
    """A hybrid model (``tilewright.nn.HybridForCausalLM``) from a folder, and its tokenizer on demand."""

    model: HybridForCausalLM
    source: Path

    @property
    def config(self) -> Limits:
        """Limits of a session."""
        config = self.model.config
        ends = config.eos_token_id
        ids = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        return Limits(int(getattr(config, "max_position_embeddings", LONGEST)), ids)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer; `CheckpointError` when it has none."""
        return directory_tokenizer(self.source)


def is_hybrid(path: Path) -> bool:
    """Whether a folder's ``config.json`` describes a hybrid model."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def load_hybrid(path: Path) -> HybridLanguageModel:
    """Load a folder written by :func:`save_hybrid`, or by transformers' ``save_pretrained``.

    Raises:
        CheckpointError: a file is absent or damaged, or does not fit the configuration.
    """
    from tilewright.nn import HybridForCausalLM

    try:
        with _without_bars():
            loaded: Any = HybridForCausalLM.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
    except Exception as wrong:
        raise CheckpointError(f"{path.name}: the hybrid model cannot be loaded: {wrong}") from wrong
    model, found = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            names = ", ".join(sorted(map(str, found[kind]))[:3])
            raise CheckpointError(f"{path.name}: its weights do not fit its config.json, {kind}: {names}")
    return HybridLanguageModel(model.eval().requires_grad_(False), path)


def save_hybrid(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """Write a model and its tokenizer into a folder as transformers does; other files there stay.

    Each file is written beside and renamed, ``config.json`` last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".save-") as folder:
        with _without_bars():
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = sorted(Path(folder).iterdir(), key=lambda path: (path.name == "config.json", path.name))
        for path in files:
            sync(path)
            os.replace(path, directory / path.name)  # noqa: PTH105
    sync(directory)


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose token ids are the bytes of the text's UTF-8.

    It is a byte-level BPE without merges, so ``AutoTokenizer`` loads what it saves.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_characters()
    core = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws bars even where no terminal listens; none inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves; the others are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
