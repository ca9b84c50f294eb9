# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, the same for every runner. Needs numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_STEPS = 8
MEMORY = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}


class Runner(Protocol):
    """One way of running one model, greedy, one sequence at a time, with its cache inside.

    Made by `Runner(model: str, threads: int, max_length: int, **options)`, which loads the model.
    """

    def facts(self) -> dict[str, Any]:
        """`bytes` and `bits_per_weight` of the weights, `library`, and what else identifies the runner."""

    def reset(self) -> None:
        """Forget all tokens."""

    def prefill(self, tokens: list[int]) -> int:
        """Append tokens; the most likely next one."""

    def step(self, token: int) -> int:
        """Append one token; the most likely next one."""

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), vocabulary]: logits at every position of a sequence of its own."""


@dataclass(frozen=True)
class Spec:
    """One measurement. Tokens come as ids, so that every method sees the same ones.

    windows: pieces of each text whose perplexity is asked for. prompt, decode, repeats: the timed prompt, the single
    tokens timed behind it, and how often. prompts, new_tokens, stop_ids: what is continued to be read. options: what
    the runner takes besides.
    """

    runner: str
    model: str
    threads: int
    windows: dict[str, list[list[int]]] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    decode: int = 0
    repeats: int = 1
    prompts: list[list[int]] = field(default_factory=list)
    new_tokens: int = 0
    stop_ids: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Longest sequence that any part of the measurement reaches."""
        lengths = [len(self.prompt) + max(self.decode, WARM_STEPS)]
        lengths += [len(window) for windows in self.windows.values() for window in windows]
        lengths += [len(prompt) + self.new_tokens for prompt in self.prompts]
        return max(lengths)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def memory_bytes(field: str) -> int:
    """A field of this process's memory in bytes: "VmRSS" resident, "RssAnon" its part without a file, "VmHWM" peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def negative_log_likelihood(logits: np.ndarray, tokens: list[int]) -> float:
    """Sum of -log p(tokens[i + 1] | tokens[: i + 1]) in float64; logits is [len(tokens), vocabulary]."""
    total = 0.0
    for row, target in zip(logits[:-1], tokens[1:], strict=True):
        wide = row.astype(np.float64)
        peak = wide.max()
        total += float(peak + np.log(np.exp(wide - peak).sum()) - wide[target])
    return total


def perplexity(runner: Runner, windows: list[list[int]]) -> float:
    """exp of the mean negative log likelihood over all predicted tokens; windows do not overlap."""
    total = sum(negative_log_likelihood(runner.logits(window), window) for window in windows)
    return float(np.exp(total / sum(len(window) - 1 for window in windows)))


def greedy(runner: Runner, prompt: list[int], new_tokens: int, stop_ids: list[int]) -> list[int]:
    """Greedy continuation of a prompt, without the stop token."""
    runner.reset()
    made = [runner.prefill(prompt)]
    while len(made) < new_tokens and made[-1] not in stop_ids:
        made.append(runner.step(made[-1]))
    return made[:-1] if made[-1] in stop_ids else made


def decode_steps(runner: Runner, token: int, count: int) -> None:
    """Feed `count` tokens one at a time, each the most likely after the one before."""
    for _ in range(count):
        token = runner.step(token)


def speeds(runner: Runner, spec: Spec) -> dict[str, list[int]]:
    """Every repetition's nanoseconds: the prompt into an empty cache, then `decode` single tokens behind it."""
    prefill, decode = [], []
    for _ in range(spec.repeats):
        runner.reset()
        start = time.perf_counter_ns()
        token = runner.prefill(spec.prompt)
        between = time.perf_counter_ns()
        decode_steps(runner, token, spec.decode)
        prefill.append(between - start)
        decode.append(time.perf_counter_ns() - between)
    return {"prefill_ns": prefill, "decode_ns": decode}


def measure(make: Callable[..., Runner], spec: Spec) -> dict[str, Any]:
    """All that `spec` asks for. `make` is the runner's class, its libraries imported already."""
    before = {name: memory_bytes(field) for name, field in MEMORY.items()}
    start = time.perf_counter()
    runner = make(spec.model, threads=spec.threads, max_length=spec.max_length, **spec.options)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start, **runner.facts()}
    if spec.prompt:
        runner.reset()
        decode_steps(runner, runner.prefill(spec.prompt), WARM_STEPS)
        result["resident_baseline_bytes"] = before["resident"]
        result |= {f"{name}_growth_bytes": memory_bytes(MEMORY[name]) - had for name, had in before.items()}
        result.update(speeds(runner, spec))
    result["perplexity"] = {text: perplexity(runner, windows) for text, windows in spec.windows.items()}
    result["generated"] = [greedy(runner, prompt, spec.new_tokens, spec.stop_ids) for prompt in spec.prompts]
    return result
