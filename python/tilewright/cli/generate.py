# SPDX-License-Identifier: Apache-2.0
"""`tw generate`: a prompt in, text out, as it is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilewright.cli.shared import (
    Activations,
    Cache,
    Device,
    Json,
    Model,
    Steer,
    Strength,
    Threads,
    print_json,
    read_text,
    valid_text,
)

if TYPE_CHECKING:
    from tilewright.models.engine import SamplingConfig

Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time; above 0 samples.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample among this many likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens of this total probability.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Longest sequence; what is needed if not given.")]


def sampling(temperature: float, top_k: int, top_p: float, seed: int) -> SamplingConfig:
    """The engine's sampling settings."""
    from tilewright.models.engine import SamplingConfig

    return SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the option, the file, or standard input (`-`)."""
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt once: --prompt TEXT, --prompt - for standard input, or --prompt-file FILE")
    if prompt_file is not None:
        return read_text(prompt_file, "the prompt file")
    if prompt == "-":
        data = sys.stdin.buffer.read()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not valid UTF-8 (byte {error.start}); pass UTF-8 text") from error
    return valid_text(str(prompt), "the prompt")


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; `-` reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="A UTF-8 file with the prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    act: Activations = None,
    kv: Cache = None,
    device: Device = "cpu",
    context: Context = None,
    threads: Threads = None,
    steer: Steer = None,
    strength: Strength = 1.0,
    as_json: Json = False,
) -> None:
    """Continue a prompt and print the text as it is generated."""
    from tilewright.cli.session import open_session

    text = read_prompt(prompt, prompt_file)
    stops = [valid_text(one, "--stop") for one in stop or []]
    settings = sampling(temperature, top_k, top_p, seed)
    session = open_session(model, act, kv, threads, device)
    if steer is not None:
        session.steer(steer, strength)
    ids = session.encode_chat([{"role": "user", "content": text}]) if chat else session.encode(text)
    session.start(context or min(len(ids) + max_new_tokens, session.limit))
    for piece in session.generate(ids, settings, max_new_tokens, stops):
        if not as_json:
            print(piece, end="", flush=True)
    reply = session.last
    if not as_json:
        print()
        return
    print_json(
        {
            "model": session.name,
            "prompt": text,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
            "stopped_by": reply.stopped_by,
            **reply.speeds(),
        }
    )
