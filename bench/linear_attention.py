# SPDX-License-Identifier: Apache-2.0
"""The linear-attention family beside transformers', flash-linear-attention's and our own chunked torch code.

A case's `measure` says what is timed: "forward", "training" (forward and backward), "length" (one operator at growing
T, with torch's attention beside it) or "decode" (one token with its state, at two positions).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

from bench.peers import chunked_torch, fla_torch, transformers_torch
from bench.records import ROOT, digest
from bench.timing import copies_beyond_cache, summary, time_in_turn
from tilewright import ops
from tilewright.reference.linear_attention import hgrn_recurrence, recurrence

Inputs = dict[str, Tensor]
CHUNK = 64
PREFIX = 256
MATRIX = 2048
DECODE = "gated_delta_rule_decode"
COPY = "copy of the states"


@dataclass(frozen=True)
class Operator:
    """One operator: its name in the tables, its call, which gates it takes, and its float64 definition's rule."""

    name: str
    call: Callable[[Inputs], Tensor]
    gate: str = ""  # "head", "token" or "channel"
    delta: bool = False
    scale: float | None = None


def _first(result: tuple[Tensor, Any]) -> Tensor:
    return result[0]


OPERATORS = {
    "delta": Operator(
        "chunk_delta_rule", lambda x: _first(ops.chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])), delta=True
    ),
    "gated_delta": Operator(
        "chunk_gated_delta_rule",
        lambda x: _first(ops.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"])),
        "token",
        delta=True,
    ),
    "kda": Operator(
        "chunk_kda", lambda x: _first(ops.chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"])), "channel", delta=True
    ),
    "gla": Operator("chunk_gla", lambda x: _first(ops.chunk_gla(x["q"], x["k"], x["v"], x["g"])), "channel"),
    "simple_gla": Operator(
        "chunk_simple_gla", lambda x: _first(ops.chunk_simple_gla(x["q"], x["k"], x["v"], x["g"])), "token"
    ),
    "lightning": Operator(
        "lightning_attn_func",
        lambda x: _first(ops.lightning_attn_func(x["q"], x["k"], x["v"], x["slopes"])),
        "head",
        scale=1.0,
    ),
    "retention": Operator("chunk_retention", lambda x: _first(ops.chunk_retention(x["q"], x["k"], x["v"])), "head"),
    "linear": Operator(
        "chunk_linear_attn", lambda x: _first(ops.chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False))
    ),
    "hgrn": Operator("chunk_hgrn", lambda x: _first(ops.chunk_hgrn(x["x"], x["g"])), "channel"),
}


METHODS = {
    *(operator.name for operator in OPERATORS.values()),
    *(f"{DECODE} at the {place}" for place in ("first position", "second")),
    "lightning_attn_decode",
}
"""What goals may ask of."""
STANDARDS = {
    "transformers", "fla torch code", "chunked torch", "torch.compile", "torch attention", "full matrix",
    "matrix product", "its forward pass", "the median rate", COPY,
}  # fmt: skip
"""What goals may measure it against."""


def draw(op: str, tokens: int, heads: int, key: int, value: int, batch: int = 1, seed: int = 0) -> Inputs:
    """Random inputs: unit keys, beta in (0, 1), log decays around -0.04 (the token's gates of a trained model)."""
    torch.manual_seed(seed)
    operator = OPERATORS[op]
    if op == "hgrn":
        shape = (batch, tokens, heads * value)
        return {"x": torch.randn(shape), "g": logsigmoid(torch.randn(shape) + 3)}
    inputs = {
        "q": torch.randn(batch, tokens, heads, key),
        "k": normalize(torch.randn(batch, tokens, heads, key), dim=-1),
        "v": torch.randn(batch, tokens, heads, value),
    }
    if operator.gate in ("token", "channel"):
        inputs["g"] = logsigmoid(torch.randn(batch, tokens, heads, *([key] if operator.gate == "channel" else [])) + 3)
    if operator.delta:
        inputs["beta"] = torch.sigmoid(torch.randn(batch, tokens, heads))
    if op == "lightning":
        inputs["slopes"] = ops.build_slope_tensor(heads, 0, 2)
    return inputs


def head_decays(op: str, heads: int) -> Tensor:
    """log decay [H] of the operators whose decay is a constant of the head."""
    if op == "lightning":
        return -ops.build_slope_tensor(heads, 0, 2)
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float()


def exact(op: str, inputs: Inputs, tokens: int) -> Tensor:
    """The definition in float64 over the first `tokens`; outputs depend on no later one."""
    wide = {name: x[:, :tokens].double() if x.dim() > 1 else x.double() for name, x in inputs.items()}
    if op == "hgrn":
        return hgrn_recurrence(wide["x"], wide["g"])[0]
    operator = OPERATORS[op]
    g = head_decays(op, wide["v"].shape[2]).double() if operator.gate == "head" else wide.get("g")
    rule = "delta" if operator.delta else "additive"
    return recurrence(wide["q"], wide["k"], wide["v"], beta=wide.get("beta"), g=g, rule=rule, scale=operator.scale)[0]


def chunked(op: str, inputs: Inputs) -> Tensor:
    """Our chunked torch code on the operator's inputs."""
    if op == "hgrn":
        return chunked_torch.chunked_hgrn(inputs["x"], inputs["g"])
    g = inputs.get("g")
    if OPERATORS[op].gate == "head":
        batch, tokens, heads, _ = inputs["v"].shape
        g = head_decays(op, heads).expand(batch, tokens, heads)
    x = inputs
    return chunked_torch.chunked(x["q"], x["k"], x["v"], g=g, beta=x.get("beta"), scale=OPERATORS[op].scale)


def peers(op: str, compiled: bool) -> dict[str, Callable[[Inputs], Tensor]]:
    """Every available torch form of an operator, and torch.compile of the first that a library has (or of ours)."""
    found: dict[str, Callable[[Inputs], Tensor]] = {}
    for name, peer in (("transformers", transformers_torch), ("fla torch code", fla_torch)):
        if op in peer.FORMS and peer.why_absent() is None:
            found[name] = peer.FORMS[op]
    found["chunked torch"] = partial(chunked, op)
    if op == "lightning":
        found["full matrix"] = full_matrix
    if compiled:
        found["torch.compile"] = torch.compile(next(iter(found.values())), dynamic=False)
    return found


def full_matrix(inputs: Inputs) -> Tensor:
    """Lightning attention as ((Q K^T) o M) V over the whole sequence, as Lightning Attention-1 evaluates it."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    place = torch.arange(q.shape[2])
    distance = place[:, None] - place
    decay = (-inputs["slopes"][:, None, None] * distance).masked_fill_(distance < 0, float("-inf")).exp_()
    return ((q @ k.mT) * decay @ v).transpose(1, 2)


def attention(inputs: Inputs) -> Tensor:
    """torch's causal softmax attention on the same q, k, v."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def operations(op: str, case: dict[str, Any], tokens: int, training: bool = False) -> int:
    """Multiplications and additions of the chunked form with chunks of 64 (for HGRN, of the recurrence).

    Per token and head, forward: 4 K V + 2 C (K + V), with the delta rule 6 K V + 4 C K + 3 C V. The backward pass adds
    the products of its formulas, without what it computes again: 8 K V + C (6 K + 4 V), and 12 K V + C (8 K + 7 V).
    """
    if op == "hgrn":
        return (2 + 4 * training) * tokens * case["heads"] * case["value"]
    k, v, c = case["key"], case["value"], CHUNK
    each = 6 * k * v + 4 * c * k + 3 * c * v if OPERATORS[op].delta else 4 * k * v + 2 * c * (k + v)
    if training:
        each += 12 * k * v + c * (8 * k + 7 * v) if OPERATORS[op].delta else 8 * k * v + c * (6 * k + 4 * v)
    return each * tokens * case["heads"]


def matrix_peak(seconds: float) -> float:
    """Operations per second of torch's float32 matrix product."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    times = time_in_turn({"mm": lambda _: torch.mm(a, b)}, seconds)["mm"]
    return 2 * MATRIX**3 / (median(times) / 1e9)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want).norm() / want.norm())


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[linear_attention]]` case."""
    measures = {"forward": forward_case, "training": training_case, "length": length_case, "decode": decode_case}
    return measures[case["measure"]](case, threads, seconds)


def _record(case: dict[str, Any], name: str, times: list[int], **more: Any) -> dict[str, Any]:
    keys = ("op", "batch", "tokens", "heads", "key", "value")
    problem = {key: case[key] for key in keys if key in case}
    return {"op": name, "problem": problem, "dtype": "float32", "kernel": name, **summary(times), **more}


def _ratios(samples: dict[str, list[int]], name: str) -> dict[str, float]:
    own = median(samples[name])
    return {other: median(times) / own for other, times in samples.items() if other != name}


def forward_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One operator's forward pass beside its peers and torch's attention."""
    del threads
    op, tokens = case["op"], case["tokens"]
    inputs = draw(op, tokens, case["heads"], case["key"], case["value"])
    forms = {OPERATORS[op].name: OPERATORS[op].call} | peers(op, case.get("compile", False))
    if op != "hgrn" and case["key"] == case["value"]:
        forms["torch attention"] = attention
    with torch.no_grad():
        found = {name: form(inputs) for name, form in forms.items()}
        works = {name: partial(lambda form, _: form(inputs), form) for name, form in forms.items()}
        samples = time_in_turn(works, seconds, least=1)
        peak = matrix_peak(seconds)
    want, count = exact(op, inputs, min(tokens, PREFIX)), operations(op, case, tokens)
    records = []
    for name, times in samples.items():
        error = 0.0 if name == "torch attention" else relative(found[name][:, :PREFIX], want)
        record = _record(case, name, times, operations=count, digest=digest(found[name]), relative_error=error)
        record["ratios"] = _ratios(samples, name)
        if name == OPERATORS[op].name:
            record["peak_operations_per_s"] = peak
            record["ratios"]["matrix product"] = 1e9 * count / record["median_ns"] / peak
        records.append(record)
    return records


def _trained(form: Callable[[Inputs], Tensor], inputs: Inputs, gradient: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if name != "slopes"}
    form({**inputs, **leaves}).backward(gradient)
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def training_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward beside the peers, the forward pass alone, and peak memory in processes of their own."""
    op, tokens = case["op"], case["tokens"]
    inputs = draw(op, tokens, case["heads"], case["key"], case["value"])
    ours = OPERATORS[op].name
    forms = {ours: OPERATORS[op].call} | peers(op, case.get("compile", False))
    gradient = torch.randn(inputs["x" if op == "hgrn" else "v"].shape)
    works: dict[str, Callable[[int], Any]] = {
        name: partial(lambda form, _: _trained(form, inputs, gradient), form) for name, form in forms.items()
    }
    works["forward alone"] = lambda _: OPERATORS[op].call(inputs)
    found = {name: _trained(form, inputs, gradient) for name, form in forms.items()}
    samples = time_in_turn(works, seconds, least=1)
    alone = samples.pop("forward alone")
    peak = matrix_peak(seconds)
    count = operations(op, case, tokens, training=True)
    records = []
    for name, times in samples.items():
        record = _record(case, name, times, operations=count, digest=digest(found[name]["x" if op == "hgrn" else "k"]))
        record["relative_error"] = gradient_error(op, forms[name], inputs, gradient)
        record["ratios"] = _ratios(samples, name)
        if name == ours:
            record["peak_operations_per_s"] = peak
            record["ratios"]["matrix product"] = 1e9 * count / record["median_ns"] / peak
            record["ratios"]["its forward pass"] = median(alone) / record["median_ns"]
        if name != "torch.compile":
            record["peak_bytes"] = peak_bytes(case, name, threads)
        records.append(record)
    return records


def gradient_error(op: str, form: Callable[[Inputs], Tensor], inputs: Inputs, gradient: Tensor) -> float:
    """Largest relative error of a gradient on the first tokens, against autograd through the float64 definition."""
    few = {name: x[:, :PREFIX] if x.dim() > 1 else x for name, x in inputs.items()}
    tokens = next(iter(few.values())).shape[1]
    wide = {name: x.double() for name, x in few.items()}
    want = _trained(lambda x: exact(op, x, tokens), wide, gradient[:, :PREFIX].double())
    got = _trained(form, few, gradient[:, :PREFIX])
    return max(relative(got[name], want[name]) for name in want)


def length_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Tokens per second at T from `shortest` to `longest`, by doubling; torch's attention up to `attention_until`."""
    del threads
    op, call = case["op"], OPERATORS[case["op"]].call
    lengths = [case["shortest"]]
    while lengths[-1] * 2 <= case["longest"]:
        lengths.append(lengths[-1] * 2)
    whole = draw(op, lengths[-1], case["heads"], case["key"], case["value"])
    cut = {t: {name: x[:, :t].contiguous() if x.dim() > 1 else x for name, x in whole.items()} for t in lengths}
    works: dict[str, Callable[[int], Any]] = {f"T={t}": partial(lambda t, _: call(cut[t]), t) for t in lengths}
    until = [t for t in lengths if 2 * lengths[0] <= t <= case["attention_until"]]
    works |= {f"attention T={t}": partial(lambda t, _: attention(cut[t]), t) for t in until}
    want = exact(op, whole, min(lengths[0], PREFIX))
    with torch.no_grad():
        found = {name: _seen(work(0), want) for name, work in works.items()}
        samples = time_in_turn(works, seconds, least=1)
    rates = {t: t / median(samples[f"T={t}"]) for t in lengths}
    middle = median(rates.values())
    records = []
    for t in lengths:
        name = f"T={t}"
        record = _record({**case, "tokens": t}, OPERATORS[op].name, samples[name], **found[name])
        record |= {"operations": operations(op, case, t), "tokens_per_s": 1e9 * rates[t]}
        # 1 is the median rate; slower and faster both count as less.
        record["ratios"] = {"the median rate": min(rates[t] / middle, middle / rates[t])}
        if t in until:
            record["ratios"]["torch attention"] = median(samples[f"attention {name}"]) / record["median_ns"]
        records.append(record)
    for t in until:
        name = f"attention T={t}"
        record = _record({**case, "tokens": t}, "torch attention", samples[name], **found[name])
        record |= {"operations": 2 * t * t * case["heads"] * case["key"], "relative_error": 0.0, "ratios": {}}
        records.append(record | {"tokens_per_s": 1e9 * t / record["median_ns"]})
    return records


def _seen(out: Tensor, want: Tensor) -> dict[str, Any]:
    """What is kept of a result: its digest, and its error on the first tokens."""
    return {"digest": digest(out), "relative_error": relative(out[:, : want.shape[1]], want)}


def decode_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One step with its state in place at two positions, beside transformers' and a plain copy of the states.

    Every call takes the next of several pools of states, so many that none is still cached, as layers do in a model.
    """
    del threads
    heads, key, value, batch = case["heads"], case["key"], case["value"], case["batch"]
    near, far = case["shortest"], case["longest"]
    states = {near: _state_after(case, near), far: _state_after(case, far)}
    step = draw("gated_delta", 1, heads, key, value, batch, seed=1)
    size = states[near].numel() * 4 * batch
    copies = copies_beyond_cache(size)
    pools = {t: [s.expand(batch, -1, -1, -1).contiguous() for _ in range(copies)] for t, s in states.items()}
    target, source = torch.empty_like(pools[near][0]), pools[near]
    x = step

    def ours(position: int, i: int) -> Tensor:
        return ops.gated_delta_rule_decode(
            x["q"], x["k"], x["v"], pools[position][i % copies], g=x["g"], beta=x["beta"]
        )

    slopes = ops.build_slope_tensor(heads)
    works: dict[str, Callable[[int], Any]] = {
        f"{DECODE} at the first position": partial(ours, near),
        f"{DECODE} at the second": partial(ours, far),
        "lightning_attn_decode": lambda i: ops.lightning_attn_decode(
            x["q"], x["k"], x["v"], slopes, pools[near][i % copies]
        ),
        COPY: lambda i: target.copy_(source[i % copies]),
    }
    if transformers_torch.why_absent() is None:
        works["transformers"] = lambda i: transformers_torch.gated_delta_step(x, pools[near][i % copies])
    fresh = {t: s.expand(batch, -1, -1, -1).clone() for t, s in states.items()}
    results = {
        name: ops.gated_delta_rule_decode(x["q"], x["k"], x["v"], fresh[t].clone(), g=x["g"], beta=x["beta"])
        for t, name in zip((near, far), works, strict=False)
    }
    wide = {name: tensor.double() for name, tensor in x.items()}
    samples = time_in_turn(works, seconds)
    records = []
    for name, times in samples.items():
        record = _record({**case, "op": "gated_delta"}, name, times, operations=7 * batch * heads * key * value)
        result = results.get(name, target)
        record |= {"bytes": 2 * size, "digest": digest(result), "ratios": _ratios(samples, name), "relative_error": 0.0}
        if name in results:
            state = fresh[far if name.endswith("second") else near]
            want = recurrence(**wide, rule="delta", initial_state=state.double())[0]
            record["relative_error"] = relative(result, want)
        records.append(record)
    return records


def _state_after(case: dict[str, Any], tokens: int, piece: int = 8192) -> Tensor:
    """The state [1, H, K, V] that a sequence of so many random tokens leaves."""
    state = None
    for start in range(0, tokens, piece):
        x = draw("gated_delta", min(piece, tokens - start), case["heads"], case["key"], case["value"], seed=start)
        with torch.no_grad():
            _, state = ops.chunk_gated_delta_rule(
                x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=state, output_final_state=True
            )
    assert state is not None
    return state


def peak_bytes(case: dict[str, Any], name: str, threads: int) -> int:
    """Growth of resident memory over one training step of a form, in a fresh process."""
    request = json.dumps({"case": case, "name": name, "threads": threads})
    command = [sys.executable, "-m", "bench.linear_attention", request]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment)
    return int(done.stdout)


def main() -> None:
    """In the fresh process: measure the peak of the form that the request names."""
    from tilewright.measure.protocol import memory_bytes

    request = json.loads(sys.argv[1])
    case, op = request["case"], request["case"]["op"]
    torch.set_num_threads(request["threads"])
    forms = {OPERATORS[op].name: OPERATORS[op].call} | peers(op, False)
    form = forms[request["name"]]

    def step(tokens: int) -> None:
        inputs = draw(op, tokens, case["heads"], case["key"], case["value"])
        _trained(form, inputs, torch.randn(inputs["x" if op == "hgrn" else "v"].shape))

    step(min(128, case["tokens"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")
    step(case["tokens"])
    print(memory_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
