# SPDX-License-Identifier: Apache-2.0
"""Whole models: every method in a process of its own, round after round, on the same tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import ik_llama_cpp, llama_cpp, torch_eager
from bench.timing import summary
from tilewright import demo
from tilewright.data import smollm2_gguf
from tilewright.formats import pack_ternary, quantize_ternary
from tilewright.measure.launch import MeasureError, Method, run
from tilewright.measure.protocol import Spec
from tilewright.models import LanguageModel, linear_names, save

PEERS = {"torch": torch_eager, "llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama_cpp}


def ours(checkpoint: Path) -> dict[str, Method]:
    """tilewright with each kind of activation over the INT4 cache."""
    return {
        f"tilewright {act.upper()}": Method("tilewright", str(checkpoint), {"act": act, "kv_bits": 4})
        for act in ("fp8", "int8")
    }


def ternary_checkpoint(model: LanguageModel, folder: Path) -> Path:
    """The model with every decoder linear rounded to ternary values: useless predictions, the same shapes and work."""
    weights = dict(model.weights)
    for name in linear_names(model.config):
        values, scale = quantize_ternary(model.dense(name))
        weights[name] = pack_ternary(values, "t5", scale=scale)
    return save(dataclasses.replace(model, weights=weights), folder / "ternary")


def ternary_methods(gguf: Path, checkpoint: Path) -> dict[str, Method]:
    """Ternary weights on the engine, and the same matrix products in float32 torch."""
    return {
        "tilewright ternary": Method("tilewright", str(checkpoint), {"kv_bits": 16}),
        "torch float32": torch_eager.methods(gguf)["torch float32"],
    }


def chosen_methods(gguf: Path, checkpoint: Path, say: Callable[[str], None]) -> dict[str, Method]:
    """Ours and every peer that can run here; the others are named with their reason."""
    methods = ours(checkpoint)
    for name, peer in PEERS.items():
        reason = peer.available()
        if reason:
            say(f"{name}: left out: {reason}")
        else:
            methods |= peer.methods(gguf)
    return methods


def record_of(name: str, method: Method, case: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One record from all rounds of a method."""
    prefill = [ns for found in rounds for ns in found["prefill_ns"]]
    decode = [ns for found in rounds for ns in found["decode_ns"]]
    first = rounds[0]
    return {
        "op": name,
        "problem": {"model": case["name"], "prompt": case["prompt"], "decode": case["decode"]},
        "dtype": json.dumps(method.options, sort_keys=True),
        "kernel": first["library"],
        "instructions": first.get("instructions"),
        "prefill": {**summary(prefill), "tokens_per_s": 1e9 * case["prompt"] / summary(prefill)["median_ns"]},
        "decode": {**summary(decode), "tokens_per_s": 1e9 * case["decode"] / summary(decode)["median_ns"]},
        "bytes": first["bytes"],
        "bits_per_weight": first["bits_per_weight"],
        "cache_bytes": first.get("cache_bytes"),
        "resident_growth_bytes": first["resident_growth_bytes"],
        "anonymous_growth_bytes": first["anonymous_growth_bytes"],
        "perplexity": first["perplexity"],
        "digest": hashlib.sha256(json.dumps(first["generated"]).encode()).hexdigest()[:16],
    }


def add_ratios(records: list[dict[str, Any]]) -> None:
    """How many times faster each method is than each other one, for prompt and decoding."""
    for record in records:
        record["ratios"] = {
            measure: {
                other["op"]: record[measure]["tokens_per_s"] / other[measure]["tokens_per_s"]
                for other in records
                if other is not record
            }
            for measure in ("prefill", "decode")
        }


def run_case(case: dict[str, Any], threads: int, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Records of one `[[model]]` case. A method that fails is said and left out."""
    from tilewright.models import load

    gguf = smollm2_gguf()
    model = load(gguf)
    effort = demo.QUICK if quick else demo.FULL
    windows = demo.texts(model, effort)["speeches"]
    common = {
        "threads": threads,
        "prompt": windows[0][: case["prompt"]],
        "decode": case["decode"],
        "repeats": case["repeats"],
        "prompts": demo.questions(model),
        "new_tokens": effort.new_tokens,
        "stop_ids": list(model.config.eos_token_ids),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="tilewright-bench-") as folder:
        if case.get("weights") == "ternary":
            methods = ternary_methods(gguf, ternary_checkpoint(model, Path(folder)))
        else:
            methods = chosen_methods(gguf, demo.quantized_checkpoints(model, effort, Path(folder))["fireq"], say)
        for number in range(case["rounds"]):
            scored = {"speeches": windows[: case["windows"]]} if number == 0 else {}
            for name, method in methods.items():
                say(f"{case['name']}, {threads} threads, round {number + 1}: {name}")
                spec = Spec(method.runner, method.model, windows=scored, options=method.options, **common)
                try:
                    found.setdefault(name, []).append(run(spec, method.python))
                except MeasureError as error:
                    say(f"{name}: left out: {error}")
    records = [
        record_of(name, methods[name], case, rounds) for name, rounds in found.items() if len(rounds) == case["rounds"]
    ]
    add_ratios(records)
    return records
