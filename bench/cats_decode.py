# SPDX-License-Identifier: Apache-2.0
"""Whole tokens with thresholds: the decode engine dense, and with CATS at several shares, in the same precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bench.records import digest
from bench.timing import summary, time_in_turn
from tilewright.formats import quantize_int4
from tilewright.models import LanguageModel, LlamaConfig
from tilewright.models.engine import Engine
from tilewright.models.image import compile as compile_image
from tilewright.models.language_model import Weight, expected_shapes, linear_names
from tilewright.sparsify.cats import Thresholds, collect_scores, with_thresholds

DENSE = "engine dense"
CONTEXT, PROMPT = 2048, 64


def named(share: float) -> str:
    """The method's name at a share of dropped neurons."""
    return f"engine CATS {round(100 * share)} %"


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:  # noqa: ARG001
    """Records of one `[[cats_decode]]` case: one decoded token of each."""
    model, thresholds = (_smollm2 if case["weights"] == "smollm2" else _random)(case)
    images = {DENSE: compile_image(model)}
    images |= {named(k): compile_image(with_thresholds(model, one)) for k, one in thresholds.items()}
    errors = dict.fromkeys(images, 0.0)
    for k, one in thresholds.items():
        all_rows = compile_image(with_thresholds(model, one), sparse=False)
        errors[named(k)] = float((_step(images[named(k)])(0) - _step(all_rows)(0)).abs().max())
    works: dict[str, Callable[[int], torch.Tensor]] = {name: _step(image) for name, image in images.items()}
    results = {name: work(0) for name, work in works.items()}
    samples = time_in_turn(works, seconds * case.get("patience", 1))
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    return [
        {
            "op": name,
            "problem": {"weights": case["weights"], "layers": model.config.num_hidden_layers},
            "dtype": case["dtype"],
            "kernel": "engine",
            **summary(times),
            "image_bytes": images[name].nbytes,
            "operations": 0,
            "digest": digest(results[name]),
            "relative_error": errors[name],
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        for name, times in samples.items()
    ]


def _step(image: Any) -> Callable[[int], torch.Tensor]:
    """Decodes a token, at a place that stays below the cache's end."""
    engine = Engine(image, CONTEXT)
    tokens = torch.randint(0, image.config.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist()
    at = CONTEXT

    def work(_: int) -> torch.Tensor:
        nonlocal at
        if at == CONTEXT:
            engine.reset()
            engine.forward([tokens[:PROMPT]])
            at = PROMPT
        at += 1
        return engine.step(tokens[at - 1])

    return work


def _smollm2(case: dict[str, Any]) -> tuple[LanguageModel, dict[float, Thresholds]]:
    """The real model, its linears as the file has them or as bfloat16, and thresholds of real text."""
    from tilewright import data, evaluate, models

    model = models.load(data.smollm2_gguf())
    text = evaluate.text_corpus(model.tokenizer, "speeches", "calibration", max_tokens=256)
    module = models.to_transformers(model, dequantize=True)
    scores = collect_scores(module, [text[None]], method="hist", progress=False)
    if case["dtype"] == "bfloat16":
        floats: dict[str, Weight] = {name: model.dense(name).to(torch.bfloat16) for name in model.weights}
        model = dataclasses.replace(model, weights=floats)
    return model, {k: scores.thresholds(k) for k in case["sparsities"]}


def _random(case: dict[str, Any]) -> tuple[LanguageModel, dict[float, Thresholds]]:
    """Random weights in the shape of a larger model, every layer the same values at another place: speed only.

    Thresholds are quantiles for a random input of the norm's size, which is what such layers see.
    """
    hidden, inner, layers = case["hidden"], case["inner"], case["layers"]
    heads = hidden // 64
    config = LlamaConfig("llama", 1024, hidden, inner, layers, heads, heads, 64, CONTEXT, tie_word_embeddings=True)
    torch.manual_seed(0)
    linears, made, weights = set(linear_names(config)), {}, {}
    for name, shape in expected_shapes(config).items():
        key = name.split(".", 3)[-1]
        if key not in made:
            values = torch.ones(shape) if "norm" in name else torch.randn(shape) / shape[-1] ** 0.5
            as_int4 = case["dtype"] == "int4" and name in linears
            made[key] = quantize_int4(values, 32, torch.float16) if as_int4 else values.to(torch.bfloat16)
        weights[name] = made[key]
    model = LanguageModel(config, weights, source="random")
    gate = model.dense("model.layers.0.mlp.gate_proj.weight").float()
    sizes = torch.nn.functional.silu(torch.randn(8, hidden) @ gate.T).abs().flatten()
    found = {}
    for k in case["sparsities"]:
        limit = sizes.kthvalue(max(round(k * len(sizes)), 1)).values
        found[k] = Thresholds({f"model.layers.{i}.mlp": limit for i in range(layers)})
    return model, found
