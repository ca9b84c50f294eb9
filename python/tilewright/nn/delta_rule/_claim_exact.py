# SPDX-License-Identifier: Apache-2.0
"""The delta rule's exactness: against its definition in float64, against transformers, on a real layer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from tilewright.claims import Experiment, Row, at_most
from tilewright.nn.delta_rule._claim_tools import gradients, relative, worst

RULES = ("delta", "gated", "kda")
PACKED = (0, 23, 23, 24, 77)
REAL_LAYER = 15


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: S <- e^g S; S <- S + k (beta (v - S^T k))^T; o = scale S^T q.

    q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g [B, T, HV] or [B, T, HV, K]; S [B, HV, K, V].
    """
    group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(*v.shape[::2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


def draw(
    rule: str,
    batch: int,
    tokens: int,
    heads: int,
    value_heads: int,
    key_size: int,
    value_size: int,
    *,
    decay: float = 0.1,
    beta: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random inputs of a rule: unit keys, beta in (0, `beta`), log decays around -`decay`; one token in five forgets
    all (g = -50) when `decay` is infinite."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = randn(batch, tokens, heads, key_size), randn(batch, tokens, heads, key_size)
    inputs = {"q": q, "k": normalize(k, dim=-1), "v": randn(batch, tokens, value_heads, value_size)}
    if rule != "delta":
        noise = softplus(randn(batch, tokens, value_heads, *([key_size] if rule == "kda" else [])))
        inputs["g"] = -noise * (0.1 if decay == float("inf") else decay)
        if decay == float("inf"):
            forgets = torch.rand(batch, tokens, value_heads, generator=generator) < 0.2
            inputs["g"][forgets] = -50.0
    inputs["beta"] = beta * torch.sigmoid(randn(batch, tokens, value_heads))
    return {name: x.to(dtype) for name, x in inputs.items()}


def operators(rule: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The chunked operator of a rule and the recurrent one."""
    from tilewright import ops

    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "delta": (ops.chunk_delta_rule, ops.fused_recurrent_delta_rule),
        "gated": (ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule),
        "kda": (ops.chunk_kda, ops.fused_recurrent_kda),
    }
    return pairs[rule]


def definition_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: outputs, final state and all gradients in float64, dense and packed."""
    errors: dict[str, dict[str, float]] = {}
    for rule in RULES:
        experiment.say(f"{rule}: float64 against the recurrence and its autograd")
        found = {"values": 0.0, "gradients": 0.0}
        for case in _cases(experiment.quick, rule):
            for name, error in _case_errors(rule, **case).items():
                found[name] = max(found[name], error)
        errors[rule] = found
    experiment.values["definition"] = errors
    title = {"delta": "DeltaNet", "gated": "Gated DeltaNet", "kda": "KDA"}
    for rule, found in errors.items():
        yield at_most(f"{title[rule]}: float64 outputs and state against the recurrence", found["values"], 1e-12)
        yield at_most(f"{title[rule]}: float64 gradients against its autograd", found["gradients"], 1e-12)
    yield at_most("gate inside the operator: float64 gradients of A_log and dt_bias", _gate_error(), 1e-12)


def _cases(quick: bool, rule: str) -> Iterator[dict[str, Any]]:
    lengths: tuple[int | None, ...] = (1, 77, None) if quick else (1, 15, 64, 77, 200, None)
    decays = (0.1,) if rule == "delta" else (0.0, 0.1, float("inf"))
    groups = (4,) if quick else (1, 4)
    for tokens, decay, group, beta in product(lengths, decays, groups, (1.0, 2.0)):
        yield {"tokens": tokens, "decay": decay, "group": group, "beta": beta}


def _case_errors(rule: str, tokens: int | None, decay: float, group: int, beta: float) -> dict[str, float]:
    """Largest relative error of values and of gradients in both modes; `tokens` None is the packed case."""
    offsets = (0, tokens) if tokens is not None else PACKED
    heads, key_size, value_size = (1 if group > 1 else 2), 8, 12
    inputs = draw(rule, 1, offsets[-1], heads, heads * group, key_size, value_size, decay=decay, beta=beta)
    inputs["initial_state"] = torch.randn(len(offsets) - 1, heads * group, key_size, value_size, dtype=torch.float64)
    for x in inputs.values():
        x.requires_grad_()
    parts = [
        recurrence(
            **{n: x[:, a:b] for n, x in inputs.items() if n != "initial_state"},
            initial_state=inputs["initial_state"][i : i + 1],
        )
        for i, (a, b) in enumerate(pairwise(offsets))
    ]
    want = {"o": torch.cat([o for o, _ in parts], 1), "state": torch.cat([s for _, s in parts])}
    want_gradients = gradients(want.values(), inputs)
    packed = {"cu_seqlens": torch.tensor(offsets)} if tokens is None else {}
    values, slopes = 0.0, 0.0
    for operator in operators(rule):
        got = dict(zip(("o", "state"), operator(**inputs, output_final_state=True, **packed), strict=True))
        values = max(values, worst(got, want))
        slopes = max(slopes, worst(gradients(got.values(), inputs), want_gradients))
    return {"values": values, "gradients": slopes}


def _gate_error() -> float:
    """The operator's own gate against g = -exp(A_log) softplus(a + dt_bias) computed outside."""
    from tilewright.ops import chunk_gated_delta_rule, chunk_kda

    errors = []
    for rule, operator in (("gated", chunk_gated_delta_rule), ("kda", chunk_kda)):
        inputs = draw(rule, 2, 40, 2, 2, 8, 12)
        a_log, bias = torch.tensor([0.3, -0.5]), torch.tensor([0.2, -0.1]) if rule == "gated" else torch.randn(16)
        gate = {"A_log": a_log.double().requires_grad_(), "dt_bias": bias.double().requires_grad_()}
        inputs["g"] = torch.randn(inputs["g"].shape, dtype=torch.float64)
        for x in inputs.values():
            x.requires_grad_()
        everything: dict[str, Any] = inputs | gate
        got, _ = operator(**everything, use_gate_in_kernel=True)
        rows = gate["A_log"].exp() if rule == "gated" else gate["A_log"].exp()[:, None]
        bias_rows = gate["dt_bias"] if rule == "gated" else gate["dt_bias"].view(2, 8)
        want, _ = recurrence(**(inputs | {"g": -rows * softplus(inputs["g"] + bias_rows)}))
        errors += [relative(got, want), worst(gradients([got], everything), gradients([want], everything))]
    return max(errors)


def oracle_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2: transformers' own recurrences on random tensors and on those of a SmolLM2 layer reading text."""
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    experiment.say("against transformers, on random tensors and on SmolLM2's")
    tokens = 64 if experiment.quick else 256
    theirs = {"gated": torch_recurrent_gated_delta_rule, "kda": recurrent_kimi_delta_attention}
    found: dict[str, dict[str, float]] = {}
    for rule in theirs:
        random = draw(rule, 2, tokens, 4, 4, 64, 32, dtype=torch.float32)
        real = random_gates(rule, *real_heads(tokens))
        found[rule] = {
            f"{name}, {dtype}": _oracle_error(rule, theirs[rule], inputs, getattr(torch, dtype))
            for name, inputs in (("random", random), ("real", real))
            for dtype in ("float32", "bfloat16")
        }
    experiment.values["transformers"] = found
    names = {"gated": "qwen3_next's gated delta rule", "kda": "kimi_linear's KDA"}
    for rule, errors in found.items():
        for name, error in errors.items():
            bound = 1e-5 if "float32" in name else 5e-3
            what = "SmolLM2's q, k, v" if "real" in name else "random tensors"
            yield at_most(f"{names[rule]} in transformers, {what}, {name.split(', ')[1]}", error, bound)


def _oracle_error(rule: str, theirs: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype) -> float:
    inputs = {name: x if name == "g" else x.to(dtype) for name, x in inputs.items()}
    q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    state = torch.randn(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1], generator=torch.Generator().manual_seed(1))
    out, last = theirs(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    want = {"o": out, "state": last}
    errors = []
    for operator in operators(rule):
        got = operator(**inputs, initial_state=state, output_final_state=True)
        errors.append(worst(dict(zip(("o", "state"), got, strict=True)), want))
    return max(errors)


def real_heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, tokens, 9, 64] of one layer of SmolLM2 reading a speech; each kv head serves three query heads."""
    from tilewright import data, evaluate, models
    from tilewright.capture import Site, tapped

    model = models.load(data.smollm2_gguf())
    text = evaluate.text_corpus(model.tokenizer, "speeches", "evaluation", max_tokens=tokens)
    module = models.to_transformers(model, dequantize=True)
    prefix = f"model.layers.{REAL_LAYER}.self_attn."
    seen: dict[str, Tensor] = {}

    def take(point: str, x: Tensor) -> None:
        seen[point] = x.detach()

    sites: dict[str | Site, Callable[[str, Tensor], None]] = {f"{prefix}{name}_proj": take for name in "qkv"}
    with tapped(module, sites), torch.no_grad():
        module(text[None], use_cache=False)
    q, k, v = (seen[f"{site}@output"].reshape(1, tokens, -1, model.config.head_dim) for site in map(str, sites))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    return q.float(), normalize(k.float(), dim=-1), v.float()


def random_gates(rule: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The tensors with random beta in (0, 1) and random decays."""
    batch, tokens, heads, size = q.shape
    gates = draw(rule, batch, tokens, heads, heads, size, 1, dtype=torch.float32)
    return gates | {"q": q, "k": k, "v": v}


def split_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: eight segments from a zero state, their maps S -> M S + B combined, then each from its true state."""
    from tilewright.ops import linear_attention, state_transition

    experiment.say("a sequence in eight segments")
    segments, tokens = 8, 256 if experiment.quick else 1024
    offsets = torch.arange(segments + 1) * (tokens // segments)
    errors = {}
    for rule in RULES:
        inputs = draw(rule, 1, tokens, 2, 2, 32, 48, dtype=torch.float32, decay=0.05)
        gates = {name: inputs[name] for name in ("beta", "g") if name in inputs}
        state = torch.randn(1, 2, 32, 48, generator=torch.Generator().manual_seed(1))
        whole, last = linear_attention(**inputs, rule="delta", initial_state=state, output_final_state=True)
        maps, writes = state_transition(inputs["k"], v=inputs["v"], **gates, rule="delta", cu_seqlens=offsets)
        states = [state[0]]
        for m, b in zip(maps, writes, strict=True):
            states.append(m @ states[-1] + b)
        parts, ends = linear_attention(
            **inputs,
            rule="delta",
            initial_state=torch.stack(states[:-1]),
            output_final_state=True,
            cu_seqlens=offsets,
        )
        assert last is not None
        assert ends is not None
        errors[rule] = max(relative(parts, whole), relative(ends[-1:], last), relative(states[-1][None], last))
    experiment.values["segments"] = errors
    yield at_most("eight segments combined against one sweep, float32", max(errors.values()), 1e-5)


def overwrite_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5, untrained: a second value under the same key replaces the first; the additive rule returns their sum."""
    from tilewright.ops import linear_attention

    experiment.say("writing twice under one key")
    size, keys = 16, torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))[0]
    first, second = torch.randn(2, size, size, generator=torch.Generator().manual_seed(3))
    k = torch.cat((keys, keys, keys))[None, :, None]
    v = torch.cat((first, second, torch.zeros_like(first)))[None, :, None]
    writes = torch.cat((torch.ones(2 * size), torch.zeros(size)))[None, :, None]
    outputs = {
        "delta": linear_attention(k, k, v, beta=writes, rule="delta", scale=1.0)[0],
        "additive": linear_attention(k, k, v, rule="additive", scale=1.0)[0],
    }
    read = {rule: out[0, 2 * size :, 0] for rule, out in outputs.items()}
    wrong = relative(read["additive"], second)
    yield at_most("second value under the same key, read back by the delta rule", relative(read["delta"], second), 1e-5)
    yield at_most("the additive rule returns the sum instead", relative(read["additive"], first + second), 1e-5)
    experiment.values["overwrite"] = {"delta": relative(read["delta"], second), "additive": wrong}
