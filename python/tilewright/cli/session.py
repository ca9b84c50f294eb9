# SPDX-License-Identifier: Apache-2.0
"""A model made ready to generate: loading, formats, the engine, tokens to text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tilewright.cli.shared import model_path, use_threads
from tilewright.cli.stream import TextStream, stream_text

if TYPE_CHECKING:
    from tilewright.models.engine import SamplingConfig

ACTIVATIONS = ("int8", "fp8")
CACHES = {"int4": 4, "bf16": 16}


def require_choice(option: str, value: str | None, allowed: Sequence[str]) -> None:
    """`ValueError` unless `value` is None or allowed."""
    if value is not None and value not in allowed:
        raise ValueError(f"{option} {value}: choose {' or '.join(allowed)}")


@dataclass
class Reply:
    """What one generation was, filled while it streams."""

    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped_by: str = "length"

    def speeds(self) -> dict[str, float | None]:
        """Tokens a second of the prompt and of the tokens after the first; None where nothing was timed."""
        rest = self.new_tokens - 1
        return {
            "prefill_tokens_per_s": self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None,
            "decode_tokens_per_s": rest / self.decode_seconds if rest > 0 and self.decode_seconds else None,
        }


@dataclass
class Session:
    """A loaded model with its engine; `generate` streams text."""

    name: str
    engine: Any
    tokenizer: Any
    context: int
    stop_ids: frozenset[int]
    last: Reply = field(default_factory=Reply)

    def generate(
        self, ids: list[int], sampling: SamplingConfig, new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Pieces of text that follow `ids`; `last` describes the generation when the iterator is done.

        Raises `ValueError` when prompt and new tokens do not fit the context.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one character")
        if len(ids) + new_tokens > self.context:
            raise ValueError(
                f"{len(ids)} prompt tokens and {new_tokens} new ones exceed the context of {self.context}; shorten the "
                "prompt, lower --max-new-tokens or raise --context"
            )
        reply = self.last = Reply(prompt_tokens=len(ids))
        stream = TextStream(lambda some: str(self.tokenizer.decode(some, skip_special_tokens=True)), stop)
        for piece in stream_text(self._timed(ids, sampling, new_tokens, reply), stream):
            reply.text += piece
            yield piece
        if stream.stopped:
            reply.stopped_by = "stop string"

    def _timed(self, ids: list[int], sampling: SamplingConfig, new_tokens: int, reply: Reply) -> Iterator[int]:
        start = time.perf_counter()
        for token in self.engine.generate(ids, sampling, max_new_tokens=new_tokens):
            now = time.perf_counter()
            if reply.new_tokens == 0:
                reply.prefill_seconds, first = now - start, now
            else:
                reply.decode_seconds = now - first
            reply.new_tokens += 1
            if token in self.stop_ids:
                reply.stopped_by = "stop token"
                return
            yield token

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for its answer."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{self.name} brings no chat template; use `tw generate` with a plain prompt")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def open_session(
    model: str,
    act: str | None = None,
    kv: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Session:
    """Load a model and build its engine.

    act, kv: override what the checkpoint says. context: longest sequence; the model's limit when None, at most 8192.
    Errors are those of `tilewright.models.load` and `tilewright.models.engine.Engine`.
    """
    require_choice("--act", act, ACTIVATIONS)
    require_choice("--kv", kv, tuple(CACHES))
    path = model_path(model)
    use_threads(threads)
    from tilewright.models import load
    from tilewright.models.engine import Engine

    say(f"loading {path.name}")
    loaded = load(path)
    length = context or min(loaded.config.max_position_embeddings, 8192)
    engine = Engine(loaded, max_length=length, act=act, kv_bits=CACHES[kv] if kv else None)
    return Session(path.name, engine, loaded.tokenizer, length, frozenset(loaded.config.eos_token_ids))
