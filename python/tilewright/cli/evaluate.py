# SPDX-License-Identifier: Apache-2.0
"""`tw eval`: perplexity of a model over a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.cli.shared import Activations, Cache, Json, Model, Threads, print_json, read_text


def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|FILE", help="A UTF-8 file, or a shipped corpus.")
    ] = "speeches",
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of context of one window.")] = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Tokens between windows. [default: window]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Use only the text's beginning.")
    ] = None,
    act: Activations = None,
    kv: Cache = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity by sliding windows: each token is scored once, with at least `window - stride` tokens before it."""
    from tilewright.cli.session import open_session
    from tilewright.data import CORPORA, corpus
    from tilewright.evaluate import perplexity, tokenize

    words = corpus(text, "evaluation") if text in CORPORA else read_text(Path(text), "the text")
    session = open_session(model, act, kv, threads)
    # One token more than will be used tells perplexity() that the text went on.
    tokens = tokenize(session.tokenizer, words, max_tokens=max_tokens + 1 if max_tokens else None)
    session.start(window)
    result = perplexity(session.engine.logits, tokens, window=window, stride=stride, max_tokens=max_tokens)
    if as_json:
        print_json(
            {
                "model": session.name,
                "text": text,
                "perplexity": result.perplexity,
                "nll": result.nll,
                "stderr": result.stderr,
                "tokens": result.tokens,
                "window": result.window,
                "stride": result.stride,
                "truncated": result.truncated,
            }
        )
        return
    part = f"the first {result.tokens:,} tokens" if result.truncated else f"{result.tokens:,} tokens"
    print(f"perplexity {result.perplexity:.3f} over {part} of {text} (window {window}, stride {result.stride})")
