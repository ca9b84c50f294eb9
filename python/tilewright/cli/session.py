# SPDX-License-Identifier: Apache-2.0
"""A model made ready to generate: loading, formats, the engine, tokens to text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tilewright.cli.shared import model_path, use_threads
from tilewright.cli.stream import TextStream, stream_text

if TYPE_CHECKING:
    from pathlib import Path

    from tilewright.models import LanguageModel
    from tilewright.models.engine import SamplingConfig

ACTIVATIONS = ("int8", "fp8", "fp8-fold")
CACHES = {"int4": 4, "bf16": 16}
DEVICES = ("cpu", "cuda")


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
    """A loaded model; `start` builds its engine, then `generate` streams text."""

    name: str
    model: LanguageModel
    tokenizer: Any
    act: str | None = None
    kv_bits: int | None = None
    device: str = "cpu"
    engine: Any = None
    last: Reply = field(default_factory=Reply)

    @property
    def limit(self) -> int:
        """Longest sequence that the model can hold."""
        return self.model.config.max_position_embeddings

    @property
    def context(self) -> int:
        """Longest sequence that the engine was started for."""
        return int(self.engine.max_length)

    def steer(self, file: str, strength: float) -> None:
        """Add the activation maps of a file; before `start`."""
        from tilewright.steer import Steering

        Steering.load(file).attach(self.model, strength)

    def start(self, context: int) -> None:
        """Build the engine for sequences of up to `context` tokens; the model's weights move into it."""
        from tilewright.models.engine import Engine

        if self.device == "cuda":
            self.engine = self._cuda_engine(context)
            return
        act: Any = self.act
        self.engine = Engine(self.model, max_length=context, act=act, kv_bits=self.kv_bits, release=True)

    def _cuda_engine(self, context: int) -> Any:
        from tilewright.models.cuda_engine import CudaEngine

        if self.act == "int8":
            raise ValueError("--device cuda runs FP8 activations; leave out --act int8, or run on the CPU")
        mode: Any = {"fp8": "exact", "fp8-fold": "fold", None: None}[self.act]
        return CudaEngine(self.model, context, kv_bits=self.kv_bits, mode=mode)

    def generate(
        self, ids: list[int], sampling: SamplingConfig, new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Pieces of text that follow `ids`; `last` describes the generation when the iterator is done.

        What the engine still holds of the same beginning is not computed again. Raises `ValueError` when prompt and
        new tokens do not fit the context.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one character")
        if len(ids) + new_tokens > self.context:
            raise ValueError(
                f"{len(ids)} prompt tokens and {new_tokens} new ones exceed the context of {self.context} (the model's "
                f"limit is {self.limit}); shorten the prompt, lower --max-new-tokens or raise --context"
            )
        reply = self.last = Reply(prompt_tokens=len(ids))
        stream = TextStream(lambda some: str(self.tokenizer.decode(some, skip_special_tokens=True)), stop)
        for piece in stream_text(self._timed(ids, sampling, new_tokens, reply), stream):
            reply.text += piece
            yield piece
        if stream.stopped:
            reply.stopped_by = "stop string"

    def _timed(self, ids: list[int], sampling: SamplingConfig, new_tokens: int, reply: Reply) -> Iterator[int]:
        stop_ids = self.model.config.eos_token_ids
        start = time.perf_counter()
        for token in self.engine.generate(ids, sampling, max_new_tokens=new_tokens, reuse=True):
            now = time.perf_counter()
            if reply.new_tokens == 0:
                reply.prefill_seconds, first = now - start, now
            else:
                reply.decode_seconds = now - first
            reply.new_tokens += 1
            if token in stop_ids:
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


class TorchSession(Session):
    """A model that torch runs, module by module: maps become hooks."""

    def steer(self, file: str, strength: float) -> None:
        """Add the activation maps of a file; before `start`."""
        from tilewright.capture import attach
        from tilewright.steer import Steering

        loaded: Any = self.model
        attach(loaded.model, Steering.load(file).at(strength).maps)


class LinearizedSession(TorchSession):
    """A model written by `tw linearize` that only torch runs, layer by layer, in constant memory."""

    def start(self, context: int) -> None:
        """Make room for `context` tokens."""
        from tilewright.linearize.runner import Runner

        loaded: Any = self.model
        self.engine = Runner(loaded.model, context)


class HybridSession(TorchSession):
    """A model written by `tw train`: torch runs it, layer by layer; linear layers have states of constant size."""

    def start(self, context: int) -> None:
        """Make room for `context` tokens."""
        from tilewright.train.runner import HybridRunner

        loaded: Any = self.model
        self.engine = HybridRunner(loaded, context)


def _open_hybrid(path: Path, act: str | None, kv: str | None) -> Session:
    from tilewright.models.hybrid import load_hybrid

    if act is not None or kv is not None:
        raise ValueError(f"{path.name} is a hybrid model and runs in float; leave out --act and --kv")
    loaded: Any = load_hybrid(path)
    return HybridSession(path.name, loaded, loaded.tokenizer)


def _open_linearized(path: Path, act: str | None, kv: str | None) -> Session:
    from tilewright.linearize import load
    from tilewright.linearize.native import NoNativeForm, to_language_model
    from tilewright.models import CheckpointError

    if act is not None or kv is not None:
        raise ValueError(f"{path.name} is a linearized model and runs in float; leave out --act and --kv")
    loaded: Any = load(path)
    try:
        return Session(path.name, to_language_model(loaded), loaded.tokenizer)
    except (NoNativeForm, CheckpointError):
        # A variant or an architecture that the engine does not run; torch runs all that convert.
        return LinearizedSession(path.name, loaded, loaded.tokenizer)


def open_session(
    model: str, act: str | None = None, kv: str | None = None, threads: int | None = None, device: str = "cpu"
) -> Session:
    """Load a model; its engine is built by `Session.start`.

    act, kv: override what the checkpoint says. device: "cpu" or "cuda". Errors are those of `tilewright.models.load`,
    and `ValueError` for an unknown word.
    """
    require_choice("--act", act, ACTIVATIONS)
    require_choice("--kv", kv, tuple(CACHES))
    require_choice("--device", device, DEVICES)
    path = model_path(model)
    use_threads(threads)
    from tilewright.linearize import is_linearized
    from tilewright.models import load
    from tilewright.models.hybrid import is_hybrid

    if device != "cpu" and (is_hybrid(path) or is_linearized(path)):
        raise ValueError(f"{path.name} has linear attention, which generates on the CPU; leave out --device {device}")
    if is_hybrid(path):
        return _open_hybrid(path, act, kv)
    if is_linearized(path):
        return _open_linearized(path, act, kv)
    loaded = load(path)
    return Session(path.name, loaded, loaded.tokenizer, act, CACHES[kv] if kv else None, device)
