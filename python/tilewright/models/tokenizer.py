# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, built when first asked for: from a directory's files or from a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.models.errors import CheckpointError
from tilewright.models.gguf_file import StringArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3_SPLIT) | {"qwen2": _QWEN2_SPLIT}
# SmolLM's vocabulary was learned with every digit alone
_DIGITS_ALONE = ("smollm",)
_PLAIN = ("gpt-2", "default")


def directory_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a transformers directory; nothing is fetched."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as wrong:
        raise CheckpointError(f"{directory.name}: its tokenizer cannot be loaded: {wrong}") from wrong
    return tokenizer


def saved_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a saved tilewright checkpoint brings in tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    if not (directory / "tokenizer.json").exists():
        raise CheckpointError(
            f"{directory.name}: tokenizer.json is missing; the checkpoint was saved without a tokenizer"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            str(directory), local_files_only=True
        )
    except Exception as wrong:
        raise CheckpointError(f"{directory.name}: its tokenizer cannot be loaded: {wrong}") from wrong
    return tokenizer


def gguf_tokenizer(metadata: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer described by a GGUF file.

    Byte-level vocabularies with a known split are built directly; others go through transformers' converter.

    Raises:
        CheckpointError: the file brings none, or an inconsistent one.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens.tolist() if isinstance(tokens, StringArray) else []
    if not isinstance(kind, str) or not tokens:
        raise CheckpointError(
            f"{path.name}: brings no tokenizer (tokenizer.ggml.model and tokenizer.ggml.tokens are needed)"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path.name}: tokenizer.ggml.tokens holds a token twice; the file is damaged")
    split = metadata.get("tokenizer.ggml.pre", "default")
    known = split in _SPLITS or split in _DIGITS_ALONE or split in _PLAIN
    try:
        if kind != "gpt2" or not known or "tokenizer.ggml.merges" not in metadata:
            return _through_transformers(path)
        return _wrap(_byte_level(metadata, tokens, split), metadata, tokens)
    except CheckpointError:
        raise
    except Exception as wrong:
        raise CheckpointError(f"{path.name}: its tokenizer cannot be built: {wrong}") from wrong


def _through_transformers(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    return tokenizer


def _byte_level(metadata: dict[str, Any], tokens: list[str], split: str) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"].tolist()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    if split in _SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(_SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
        if split in _DIGITS_ALONE:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type")
    kinds = [] if types is None else [int(t) for t in types]
    if kinds and len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(kinds)} entries, the vocabulary {len(tokens)}")
    special = [
        AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=False) if k == _CONTROL
    ]
    whole = [
        AddedToken(t, normalized=False, special=False)
        for t, k in zip(tokens, kinds, strict=False)
        if k == _USER_DEFINED
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)
    return tokenizer


def _wrap(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    named: dict[str, str] = {}
    for name, key in _SPECIAL_IDS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is not None:
            if not isinstance(index, int) or not 0 <= index < len(tokens):
                raise CheckpointError(
                    f"tokenizer.ggml.{key}={str(index)[:40]} lies outside the vocabulary of {len(tokens)}"
                )
            named[name] = tokens[index]
    if metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        wrapped.chat_template = template
    return wrapped
