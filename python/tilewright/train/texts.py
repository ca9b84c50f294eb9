# SPDX-License-Identifier: Apache-2.0
"""Texts and tokenizers of a training run, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.data import CORPORA, corpus
from tilewright.data.bytes import DOCUMENTATION, documentation, to_bytes

BYTES, BPE = "bytes", "bpe:"
_LEAST_VOCABULARY, _LARGEST_VOCABULARY = 300, 1 << 20


def read_texts(names: Iterable[str]) -> tuple[str, str]:
    """Training and held-out text of names (see :func:`read_text`), each one after another."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name in names:
        for part, text in zip(parts, read_text(name), strict=True):
            part.append(text)
    return "\n".join(parts[0]), "\n".join(parts[1])


def read_text(name: str) -> tuple[str, str]:
    """Training and held-out text of a corpus of ``tilewright.data``, "documentation", or a UTF-8 file.

    Of a file the last twentieth is held out; the others bring their own held-out text.
    """
    if name in CORPORA:
        return corpus(name, "calibration"), corpus(name, "evaluation")
    if name == DOCUMENTATION:
        return documentation("calibration"), documentation("evaluation")
    text = read_file(name)
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def read_file(name: str) -> str:
    """A whole UTF-8 file; `ValueError` naming it and the byte when it is not UTF-8."""
    try:
        return Path(name).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 (byte {error.start}); convert it to UTF-8") from error


def tokenizer_of(name: str, training_text: str = "") -> Any:
    """A tokenizer of transformers: "bytes", "bpe:N" (learned from ``training_text``), or that of a model."""
    from tilewright.models import load
    from tilewright.models.hybrid import byte_tokenizer

    if name == BYTES:
        return byte_tokenizer()
    if name.startswith(BPE):
        return bpe_tokenizer(training_text, vocabulary_size(name))
    return load(name).tokenizer


def vocabulary_size(name: str) -> int:
    """N of a tokenizer "bpe:N"; `ValueError` when it is no number in range."""
    digits = name.removeprefix(BPE)
    size = int(digits) if digits.isdecimal() else 0
    if not _LEAST_VOCABULARY <= size <= _LARGEST_VOCABULARY:
        raise ValueError(f"tokenizer {name!r}: bpe:{_LEAST_VOCABULARY} to bpe:{_LARGEST_VOCABULARY} is needed")
    return size


def bpe_tokenizer(text: str, size: int) -> Any:
    """A byte-level byte-pair encoding of exactly ``size`` tokens (GPT-2's splitting), learned from a text.

    Every byte is a token, so any text can be encoded; there are no special tokens.

    Raises:
        ValueError: the text has too few different pairs for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    if core.get_vocab_size() != size:
        raise ValueError(f"bpe:{size}: the text gives {core.get_vocab_size()} tokens; use more text or a smaller size")
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def encode(tokenizer: Any, name: str, text: str) -> Tensor:
    """Token ids [N] of a text; ``name`` is the tokenizer's, as bytes need no tokenizer."""
    from tilewright.evaluate import tokenize

    return to_bytes(text) if name == BYTES else tokenize(tokenizer, text)


def token_lengths(tokenizer: Any) -> Tensor:
    """Bytes of text that each token of a byte-level tokenizer stands for: int64 [V].

    Raises:
        ValueError: the tokenizer writes a byte as something else than one character.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if not all(set(name) <= alphabet for name in names):
        raise ValueError("the tokenizer is not byte-level, so bits a byte cannot be counted from its tokens")
    return torch.tensor([len(name) for name in names])


def require_longer(tokens: Sequence[Tensor], length: int) -> None:
    """Raise unless training and held-out tokens fill a window of ``length`` and its labels."""
    for what, one in zip(("training", "held-out"), tokens, strict=True):
        if len(one) <= length:
            raise ValueError(
                f"the {what} text has {len(one)} tokens, more than length={length} are needed; give more text or a "
                "smaller length"
            )
