# SPDX-License-Identifier: Apache-2.0
"""The part of Liger's claim that needs no training: the layer against its definition, decoding, memory and time."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.linearize.cache import state_nbytes
from tilewright.linearize.liger.config import VARIANTS, LigerConfig
from tilewright.linearize.liger.method import LigerAttention, convert_to_liger, liger_attention
from tilewright.linearize.liger.recurrence import features, recurrent_branch
from tilewright.linearize.runner import Runner
from tilewright.models.hf_names import cache_name
from tilewright.reference.liger import liger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tilewright.linearize.liger._claim_model import Bench

PROMPT, NEW = 200, 32
BEGINNING = "The people of the United States"
ROUNDS = 40
LENGTHS = (128, 512, 1024, 2048, 4096)


def oracle_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: random inputs, grouped heads, 150 tokens, against the loop over tokens in float64."""
    experiment.say("the layer against its definition")
    worst = {"value": 0.0, "gradient": 0.0}
    tokens, dim = (70, 16) if experiment.quick else (150, 32)
    for seed, variant in enumerate(VARIANTS):
        generator = torch.Generator().manual_seed(seed)
        x = [torch.randn(1, tokens, h, dim, generator=generator, dtype=torch.float64) for h in (6, 2, 2)]
        x = [one.requires_grad_() for one in x]
        turn = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.logspace(0, -3, dim // 2, dtype=torch.float64)
        q, k, v = x
        want = liger(q, k, v, turn, variant=variant, window=24)
        probe = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        gradients = torch.autograd.grad((want * probe).sum(), x)
        cos, sin = (torch.cat([f(turn)] * 2, -1)[None] for f in (torch.cos, torch.sin))
        for mode in ("chunk", "recurrent"):
            qs, ks, vs = (one.detach().float() for one in x)
            got = liger_attention(
                qs, ks, vs, cos=cos.float(), sin=sin.float(), variant=variant, window_size=24, mode=mode
            )
            worst["value"] = max(worst["value"], _error(got.double(), want))
            made = liger_attention(q, k, v, cos=cos, sin=sin, variant=variant, window_size=24, mode=mode)
            for one, other in zip(torch.autograd.grad((made * probe).sum(), x), gradients, strict=True):
                worst["gradient"] = max(worst["gradient"], _error(one, other))
    experiment.values["layer"] = worst
    yield at_most("three variants, chunked and recurrent: largest error of a value, float32", worst["value"], 1e-5)
    yield at_most("the same: largest error of a gradient, float64", worst["gradient"], 1e-9)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max())


def reuse_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 3: the softmax branch alone with a window over everything is the base model; in float64 (the norms
    of transformers round to float32 all the same), where the order of sums cannot hide a difference."""
    experiment.say("the softmax branch alone")
    model = copy.deepcopy(bench.base).double()
    ids = bench.text[None, : PROMPT // 2]
    with torch.no_grad():
        want = model(ids).logits
        model = convert_to_liger(model, alpha=0.0, beta=1.0, window_size=PROMPT, inplace=True)
        change = _error(model(ids).logits, want)
    yield at_most("alpha 0, beta 1, window over the text: largest change of a logit of the base model", change, 1e-4)


def decode_rows(experiment: Experiment, bench: Bench, tuned: PreTrainedModel) -> Iterator[Row]:
    """Item 2: greedy decoding behind 200 tokens against one pass over all of them."""
    experiment.say("decoding against the full forward pass")
    first = bench.scale.first
    whole = {"gla, tuned": bench.whole(tuned)}
    if not experiment.quick:
        whole |= {v: convert_to_liger(bench.base, v, layers=range(first, 30)) for v in ("hgrn2", "gsa")}
    found = {name: _decode_error(model, bench.text[:PROMPT].tolist()) for name, model in whole.items()}
    experiment.values["decoding"] = found
    names = " / ".join(found)
    yield at_most(f"{names}: largest change of a logit, decoded or not", max(e for e, _ in found.values()), 1e-3)
    yield at_least(f"{names}: equal greedy tokens of {NEW}", min(n for _, n in found.values()), NEW)
    tokenizer = bench.loaded.tokenizer
    runner = Runner(whole["gla, tuned"], PROMPT)
    new = list(runner.generate(tokenizer(BEGINNING)["input_ids"], max_new_tokens=20))
    text = " ".join(str(tokenizer.decode(new, skip_special_tokens=True)).split())
    yield Row(f"how the tuned model continues {BEGINNING!r}", "", text, "reported", True)


def _decode_error(model: PreTrainedModel, ids: list[int]) -> tuple[float, int]:
    """Largest difference of logits, and how many greedy tokens come before the first difference."""
    runner, made, rows = Runner(model, PROMPT + NEW), list(ids), []
    for _ in range(NEW):
        rows.append(runner.forward(made[len(runner.held) :])[0])
        made.append(int(rows[-1].argmax()))
    full = Runner(model, PROMPT + NEW).logits(made[:-1])[PROMPT - 1 :]
    same = [a == b for a, b in zip(full.argmax(-1).tolist(), made[PROMPT:], strict=True)]
    return _error(torch.stack(rows), full), [*same, False].index(False)


def branch_sizes(bench: Bench, tokens: Tensor) -> tuple[dict[str, list[float]], list[float]]:
    """By layer of the base model on a text [T]: root mean square of the recurrent branch over that of the values, for
    each gate; and the share of a key's write that goes to the key's largest channel."""
    written: list[float] = []
    sizes: dict[str, list[float]] = {"key": [], "random": [], "none": []}
    body: Any = bench.base.model
    with torch.no_grad():
        hidden = body.embed_tokens(tokens[None])
        angles = body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in body.layers:
            entering = layer.input_layernorm(hidden)
            for gate, found in sizes.items():
                liger = LigerAttention(layer.self_attn, liger=LigerConfig(gate=gate))
                q, k, v = liger.project(entering)
                x = features(q, k, v, liger.gate_logits(k), liger.liger, None)
                y, _ = recurrent_branch(x, liger.liger, {})
                found.append(float(y.square().mean().sqrt() / v.square().mean().sqrt()))
            written.append(float(k.softmax(-1).amax(-1).mean()))
            hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
    return sizes, written


def largest_branches(bench: Bench, count: int) -> tuple[int, ...]:
    """The converted layers whose recurrent branch is largest on training text."""
    sizes, _ = branch_sizes(bench, bench.training[:256])
    order = sorted(range(bench.scale.first, len(sizes["key"])), key=lambda index: -sizes["key"][index])
    return tuple(sorted(order[:count]))


def cause_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Why the gate matters as it does here: where keys write, and how long that is kept."""
    experiment.say("where keys write")
    sizes, written = branch_sizes(bench, bench.text[:256])
    experiment.values["written to the largest channel"] = written
    experiment.values["size of the recurrent branch"] = sizes
    mean = sum(written) / len(written)
    yield Row("share of a key's write that its largest channel gets, mean of layers", "", mean, "reported", True)
    for gate, name in {"key": "key", "random": "random", "none": "no"}.items():
        largest = f"{sum(sizes[gate]) / len(written):.2f}, up to {max(sizes[gate]):.2f}"
        yield Row(f"root mean square of y over that of v, {name} gate, mean of layers", "", largest, "reported", True)


def cost_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 7: one attention layer of the model at growing positions, Liger beside softmax, in turns."""
    experiment.say("memory and time of decoding")
    lengths = LENGTHS[:: 2 if experiment.quick else 1]
    body: Any = bench.base.model
    layers: dict[str, nn.Module] = {"softmax": body.layers[0].self_attn}
    layers["liger"] = LigerAttention(body.layers[0].self_attn, liger=LigerConfig()).eval()
    seen: dict[str, list[float]] = {f"{name} {what}": [] for name in layers for what in ("bytes", "seconds")}
    caches = {(name, length): _filled(bench, layer, length) for length in lengths for name, layer in layers.items()}
    for (name, _), cache in caches.items():
        seen[f"{name} bytes"].append(float(state_nbytes(cache)))
    best = dict.fromkeys(caches, float("inf"))
    for turn in range(ROUNDS):
        for (name, length), cache in caches.items():
            best[name, length] = min(best[name, length], _seconds(bench, layers[name], cache, length + turn))
    for (name, _), seconds in best.items():
        seen[f"{name} seconds"].append(seconds)
    experiment.values["decode cost of a layer"] = {"tokens": list(lengths), **seen}
    span = f"{lengths[0]} to {lengths[-1]} tokens"
    bytes_, times = seen["liger bytes"], seen["liger seconds"]
    yield at_most(f"state of a layer, {span}: largest over smallest", max(bytes_) / min(bytes_), 1.0)
    title = f"time of a decoded token, {span}: largest over smallest"
    yield experiment.in_full(at_most(title, max(times) / min(times), 1.15 / 0.85))
    grown = seen["softmax bytes"][-1] / seen["softmax bytes"][0]
    yield at_least(f"softmax cache, {span}: growth", grown, 0.9 * lengths[-1] / lengths[0])
    each = seen["softmax bytes"][0] / lengths[0]
    yield Row("tokens from which the softmax cache is larger", "", bytes_[0] / each, "reported", True)
    faster = [n for n, a, b in zip(lengths, times, seen["softmax seconds"], strict=True) if a < b]
    crossover = f"{faster[0]} of {', '.join(map(str, lengths))}" if faster else "none measured"
    yield Row("tokens at which a Liger layer decodes faster, through torch", "", crossover, "reported", True)


def _filled(bench: Bench, layer: nn.Module, length: int) -> Any:
    """A cache that holds ``length`` random positions of one layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        for start in range(0, length, 128):
            _run(bench, layer, cache, start, 128)
    return cache


def _run(bench: Bench, layer: nn.Module, cache: Any, start: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(start)
    hidden = torch.randn(1, tokens, 576, generator=generator)
    body: Any = bench.base.model
    angles = body.rotary_emb(hidden, torch.arange(start, start + tokens)[None])
    # The values do not matter here, so the softmax layer may see its whole block without a causal mask.
    layer(hidden, position_embeddings=angles, attention_mask=None, **{cache_name(): cache})


def _seconds(bench: Bench, layer: nn.Module, cache: Any, position: int) -> float:
    """Seconds of one token. The least of many is taken: what else the machine does can only add."""
    with torch.inference_mode():
        start = time.perf_counter()
        _run(bench, layer, cache, position, 1)
        return time.perf_counter() - start
