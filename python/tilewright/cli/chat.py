# SPDX-License-Identifier: Apache-2.0
"""`tw chat`: a conversation in the terminal, or line by line from standard input."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tilewright.cli.generate import Context, NewTokens, Seed, Temperature, TopK, TopP, sampling
from tilewright.cli.shared import Activations, Cache, Device, Json, Model, Steer, Strength, Threads, valid_text

if TYPE_CHECKING:
    from tilewright.cli.session import Session
    from tilewright.models.engine import SamplingConfig

DEFAULT_CONTEXT = 4096
HELP = "/reset forgets the conversation, /quit or end of input leaves; Ctrl-C stops an answer."


class Conversation:
    """The messages so far; drops the oldest exchanges when the context is full."""

    def __init__(self, session: Session, system: str | None, new_tokens: int) -> None:
        self.session, self.system, self.new_tokens = session, system, new_tokens
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids that ask `question`, and how many old messages were dropped to make them fit.

        Raises `ValueError` when the question alone does not fit; the conversation is then as before.
        """
        first = 1 if self.system else 0
        history, dropped = [*self.messages, {"role": "user", "content": question}], 0
        while True:
            ids = self.session.encode_chat(history)
            if len(ids) + self.new_tokens <= self.session.context:
                self.messages = history
                return ids, dropped
            if len(history) <= first + 2:
                raise ValueError(
                    f"the message has {len(ids)} tokens; with {self.new_tokens} new ones the context of "
                    f"{self.session.context} is exceeded; shorten it or lower --max-new-tokens"
                )
            del history[first : first + 2]
            dropped += 2

    def answer(self, text: str) -> None:
        """Keep the model's answer."""
        self.messages.append({"role": "assistant", "content": text})


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="A system message that stays.")] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    act: Activations = None,
    kv: Cache = None,
    device: Device = "cpu",
    context: Context = None,
    threads: Threads = None,
    steer: Steer = None,
    strength: Strength = 1.0,
    as_json: Json = False,
) -> None:
    """Talk with a model. With --json, or without a terminal, each line of standard input is one message."""
    from tilewright.cli.session import open_session

    settings = sampling(temperature, top_k, top_p, seed)
    session = open_session(model, act, kv, threads, device)
    if steer is not None:
        session.steer(steer, strength)
    session.start(context or min(session.limit, DEFAULT_CONTEXT))
    talk = Conversation(session, valid_text(system, "--system") if system else None, max_new_tokens)
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        print(f"{session.name}. {HELP}", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        question = valid_text(line, "the message").strip()
        if question == "/quit":
            return
        if question == "/reset":
            talk.reset()
        elif question.startswith("/"):
            print(f"{question.split()[0]} is no command. {HELP}", file=sys.stderr)
        elif question:
            _exchange(talk, question, settings, as_json, interactive)


def _exchange(talk: Conversation, question: str, settings: SamplingConfig, as_json: bool, interactive: bool) -> None:
    try:
        ids, dropped = talk.prompt(question)
    except ValueError as error:
        if not interactive:
            raise
        print(error, file=sys.stderr)
        return
    if dropped:
        print(f"(the context is full: forgot the oldest {dropped} messages)", file=sys.stderr)
    try:
        for piece in talk.session.generate(ids, settings, talk.new_tokens):
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    reply = talk.session.last
    talk.answer(reply.text)
    if as_json:
        line = {"question": question, "text": reply.text, "new_tokens": reply.new_tokens}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        print()
