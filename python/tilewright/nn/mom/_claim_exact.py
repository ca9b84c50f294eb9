# SPDX-License-Identifier: Apache-2.0
"""What holds of a mixture of memories without training: the packed form, decoding, isolation, time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.nn.cache import MixerCache
from tilewright.nn.delta_rule import DeltaNet, GatedDeltaNet
from tilewright.nn.delta_rule._claim_tools import relative
from tilewright.nn.mom.attention import OPS, mom_attention
from tilewright.nn.mom.layer import MomAttention
from tilewright.reference.mom import mom_layer

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
SIZES: dict[str, Any] = {"hidden_size": 12, "head_dim": 4, "num_heads": 2, "expand_v": 1.5}
DECODED = 16
ORDERS = 16


def _layer(seed: int, *, unused: bool = False, **options: Any) -> MomAttention:
    """A small layer with weights far from zero; `unused`: no token likes the last routed memory."""
    torch.manual_seed(seed)
    layer = MomAttention(**{**SIZES, **options})
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        if unused:
            layer.router.weight[-1] = 0.0
            layer.router.weight[-1, 0] = -20.0
    return layer


def _tokens(seed: int, batch: int, length: int) -> Tensor:
    """`[B, T, D]` whose first channel is 1, so that a router's weight on it is a bias."""
    x = torch.randn(batch, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed))
    x[..., 0] = 1.0
    return x


def packed_rows(experiment: Experiment) -> Iterator[Row]:
    """Output, states and every gradient of the layer against the token loop in float64."""
    experiment.say("the packed form against the token loop")
    worst = {dtype: {"output": 0.0, "state": 0.0, "gradient": 0.0} for dtype in BOUNDS}
    excess = 0.0
    cases = 0
    for seed, (backend, memories, shared) in enumerate(itertools.product(OPS, (1, 4, 8), (True, False))):
        for topk in sorted({1, min(2, memories), memories}):
            for length in _lengths(experiment.quick, seed, memories, topk, shared):
                options = {"num_memories": memories, "topk": topk, "shared_mem": shared, "backend": backend}
                case = _Case(seed, length, unused=memories > topk and length > 1, **options)
                cases += 1
                for dtype, found in worst.items():
                    for what, e in case.errors(dtype).items():
                        found[what] = max(found[what], e)
                excess = max(excess, case.excess())
    experiment.values["packed"] = {str(dtype).removeprefix("torch."): found for dtype, found in worst.items()}
    experiment.values["packed"]["cases"] = cases
    for dtype, bound in BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        for what, e in worst[dtype].items():
            title = f"packed form against the token loop, {name}: worst {what}, relative L2"
            if dtype == torch.float32 and what == "gradient":
                # A gate's gradient is a sum that nearly cancels: no order of float32 additions keeps its digits, and
                # what one order loses by chance says little about another.
                must = f"<= {bound:.0e}, or twice the loop's own in float32, the worst of {ORDERS} orders of its sums"
                yield Row(title, "", e, must, excess <= 1.0)
            else:
                yield at_most(title, e, bound)


def _lengths(quick: bool, seed: int, memories: int, topk: int, shared: bool) -> tuple[int, ...]:
    if quick:
        return (1, 65) if memories == 4 and shared and topk < memories else (1,)
    return (1, 65, 300) if seed % 6 == 2 and topk == 2 else (1, 65)


class _Case:
    """One layer, its inputs, and what the token loop gives for them in float64."""

    def __init__(self, seed: int, length: int, *, unused: bool, **options: Any) -> None:
        self.layer, self.seed = _layer(seed, unused=unused, **options), seed
        self.parameters = {n: p.detach() for n, p in self.layer.named_parameters()}
        self.x, self.mask = _tokens(seed, 2, length), torch.ones(2, length)
        self.mask[0, : length // 4] = 0
        self.out, self.states, self.gradients = self._loop(torch.float64)

    def _upstream(self, out: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        return torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)

    def _loop(self, dtype: torch.dtype, order: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Of the float32 numbers, in any dtype; the projections' sums over the channels in this order."""
        weights = {n: p.to(dtype).requires_grad_() for n, p in self.parameters.items()}
        x, layer = self.x.to(dtype).requires_grad_(), self.layer
        sizes: dict[str, Any] = {
            "num_heads": layer.num_heads,
            "topk": layer.topk,
            "op": layer.backend,
            "shared": layer.shared_mem,
        }
        leaves = [x, *weights.values()]
        if order is not None:
            x = x[..., order]
            weights = {n: w if n == "o_proj.weight" or w.shape[-1] != len(order) else w[..., order]
                       for n, w in weights.items()}  # fmt: skip
        out, states = mom_layer(x, weights, attention_mask=self.mask, **sizes)
        return out, states, list(torch.autograd.grad(out, leaves, self._upstream(out), allow_unused=True))

    def errors(self, dtype: torch.dtype) -> dict[str, float]:
        """The packed form's worst errors of output, states and gradients."""
        layer, cache = self.layer.to(dtype), MixerCache()
        x = self.x.to(dtype).requires_grad_()
        out, _, _ = layer(x, self.mask, cache)
        got = torch.autograd.grad(out, [x, *layer.parameters()], self._upstream(out), allow_unused=True)
        self.found = self._against(list(got))
        return {
            "output": relative(out, self.out),
            "state": relative(cache[0]["recurrent_state"], self.states),
            "gradient": max(self.found),
        }

    def _against(self, got: list[Tensor | None]) -> list[float]:
        scale = max(float(g.norm()) for g in self.gradients if g is not None)
        return [_gradient_error(a, b, scale) for a, b in zip(got, self.gradients, strict=True)]

    def excess(self) -> float:
        """Largest error of a float32 gradient over what is allowed; float32 errors were taken last."""
        bound = BOUNDS[torch.float32]
        if max(self.found) <= bound:
            return max(self.found) / bound
        random = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(self.x.shape[-1], generator=random) for _ in range(ORDERS)]
        loops = [self._against(self._loop(torch.float32, order)[2]) for order in orders]
        return max(e / max(bound, 2 * max(others)) for e, *others in zip(self.found, *loops, strict=True))


def _gradient_error(got: Tensor | None, need: Tensor | None, scale: float) -> float:
    """Relative L2; relative to the largest gradient where there is none but rounding (a router with one choice)."""
    if need is None or float(need.norm()) <= 1e-12 * scale:
        return 0.0 if got is None else float(got.norm()) / scale
    return float("inf") if got is None else relative(got, need)


def single_rows(experiment: Experiment) -> Iterator[Row]:
    """One memory without a shared one is the ordinary layer, on the same kernel."""
    experiment.say("one memory against the ordinary layer")
    differing = 0
    for backend in ("gated_delta_rule", "delta_rule"):
        layer = _layer(5, num_memories=1, topk=1, shared_mem=False, backend=backend)
        if backend == "gated_delta_rule":
            plain: Any = GatedDeltaNet(12, 2, head_dim=4, expand_v=1.5)
        else:
            plain = DeltaNet(12, 2, expand_k=8 / 12, expand_v=1.0, use_gate=True)
        weights = {n: p[0] if p.dim() == 3 and n != "conv.weight" else p for n, p in layer.state_dict().items()}
        del weights["router.weight"]
        plain.load_state_dict(weights)
        with torch.no_grad():
            # Packed into one row: torch's convolution of a batch rounds otherwise than that of its rows joined.
            for lengths in ((1,), (64,), (300,), (100, 1, 0, 199)):
                x = _tokens(len(lengths), 1, sum(lengths))
                bounds = torch.tensor([0, *itertools.accumulate(lengths)]) if len(lengths) > 1 else None
                differing += int((layer(x, cu_seqlens=bounds)[0] != plain(x, cu_seqlens=bounds)[0]).sum())
    yield at_most("one memory, k = 1, none shared: numbers that differ from the plain layer's", differing, 0)


def decode_rows(experiment: Experiment) -> Iterator[Row]:
    """Prefill and steps against one forward, of the layer and of the language model's generate()."""
    experiment.say("prefill and decode against the full forward")
    worst = 0.0
    for seed, (backend, shared) in enumerate(itertools.product(OPS, (True, False))):
        layer = _layer(seed, backend=backend, shared_mem=shared)
        x, cache = _tokens(seed, 3, 96), MixerCache()
        with torch.no_grad():
            full = layer(x)[0]
            parts = [layer(x[:, :-DECODED], None, cache)[0]]
            parts += [layer(x[:, t : t + 1], None, cache)[0] for t in range(96 - DECODED, 96)]
        worst = max(worst, relative(torch.cat(parts, 1), full))
    yield at_most("prefill and 16 steps against the full forward, float32: worst relative L2", worst, 1e-4)
    error, agreeing = _generation(60 if experiment.quick else 200)
    yield at_most("language model, logits of generate() against the full forward: relative L2", error, 1e-4)
    yield at_least("language model, share of generated tokens that the full forward chooses too", agreeing, 1.0)


def _generation(tokens: int) -> tuple[float, float]:
    """Greedy decoding of a padded batch: logits against one forward over the result, and agreeing choices."""
    from tilewright.nn.mom.configuration import MomConfig
    from tilewright.nn.mom.modeling import MomForCausalLM

    torch.manual_seed(0)
    config = MomConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_heads=2, head_dim=16)
    model = MomForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        prompt, mask = torch.randint(1, 97, (3, 24)), torch.ones(3, 24, dtype=torch.long)
        mask[0, :9] = 0
        out = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps = torch.stack(out.logits, 1)
        mask = F.pad(mask, (0, tokens), value=1)
        full = model(out.sequences, attention_mask=mask, use_cache=False).logits[:, 23:-1]
    return relative(steps, full), float((full.argmax(-1) == out.sequences[:, 24:]).float().mean())


def isolation_rows(experiment: Experiment) -> Iterator[Row]:
    """24 pairs in memory 0, then 64 others in memory 1 (or all in one memory), then the 24 keys are read."""
    experiment.say("isolation of memories")
    apart, together, moved = [], [], 0.0
    for seed in (0, 1, 2):
        random = torch.Generator().manual_seed(seed)
        orthonormal = torch.linalg.qr(torch.randn(32, 32, generator=random, dtype=torch.float64))[0][:24].float()
        keys = torch.cat([orthonormal, F.normalize(torch.randn(64, 32, generator=random), dim=-1)])
        values = torch.randn(88, 32, generator=random)
        apart.append(relative(_recall(keys, values, second=1), values[:24]))
        together.append(relative(_recall(keys, values, second=0), values[:24]))
        # Keys of any angles: what is read does not change by a bit, however well it was stored.
        loose = torch.cat([F.normalize(torch.randn(24, 32, generator=random), dim=-1), keys[24:]])
        before, after = _recall(loose, values, second=-1), _recall(loose, values, second=1)
        moved = max(moved, float((before - after).abs().max()))
    experiment.values["isolation"] = {"two memories": apart, "one memory": together}
    yield at_most("24 pairs read after 64 others in another memory: worst relative error", max(apart), 1e-5)
    ratio = min(b / a for a, b in zip(apart, together, strict=True))
    yield at_least("the same with all in one memory of that size, over it: least of 3 draws", ratio, 10.0)
    yield at_most("keys at any angle: largest change of a read by the 64 others", moved, 0.0)


def _recall(keys: Tensor, values: Tensor, second: int) -> Tensor:
    """Write 24 pairs to memory 0 and the others to memory `second` (-1: nowhere), then read the 24 keys."""
    read = keys[:24]
    tokens = len(keys) + 24
    every = torch.cat([keys, read])[None, :, None]
    beta = torch.cat([torch.ones(len(keys)), torch.zeros(24)])[None, :, None, None]
    routes = torch.zeros(1, tokens, 1, dtype=torch.long)
    routes[0, 24 : len(keys)] = second
    o, _ = mom_attention(
        every,
        every[:, :, None],
        F.pad(values, (0, 0, 0, 24))[None, :, None, None],
        torch.zeros(1, tokens, 1, 1),
        beta,
        torch.ones(1, tokens, 1),
        routes,
        2,
        scale=1.0,
    )
    return o[0, -24:, 0]


def time_rows(experiment: Experiment) -> Iterator[Row]:
    """Processor time of forward and backward a token, by length and against the layer with one memory."""
    experiment.say("time by length")
    lengths = (256, 1024, 4096) if experiment.quick else (256, 512, 1024, 2048, 4096)
    rounds = 3 if experiment.quick else 7
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "num_heads": 4}
        torch.manual_seed(0)
        mixture, single = MomAttention(**sizes), MomAttention(**sizes, num_memories=1, topk=1, shared_mem=False)
        inputs = {t: torch.randn(1, t, 128) for t in lengths}
        # In turn, so that what else the machine does falls on all alike.
        spent: dict[tuple[str, int], list[float]] = {}
        for turn in range(rounds + 1):
            for t, x in inputs.items():
                for name, layer in (("mixture", mixture), ("single", single)):
                    seconds = _seconds(lambda x=x, layer=layer: layer(x)[0].sum().backward())  # type: ignore[misc]
                    if turn:
                        spent.setdefault((name, t), []).append(seconds)
    finally:
        torch.set_num_threads(threads)
    each = {name: [statistics.median(spent[name, t]) / t for t in lengths] for name in ("mixture", "single")}
    experiment.values["microseconds a token"] = {
        "length": list(lengths),
        **{name: [1e6 * s for s in seconds] for name, seconds in each.items()},
    }
    spread = max(each["mixture"]) / min(each["mixture"]) - 1
    title = "time a token, T = 256 to 4096, forward and backward: largest over smallest, minus 1"
    yield experiment.in_full(at_most(title, spread, 0.25))
    ratio = max(a / b for a, b in zip(each["mixture"], each["single"], strict=True))
    title = "time of M = 4, k = 2, shared, over one memory's: largest ratio over T"
    yield experiment.in_full(at_most(title, ratio, 3 * 1.6))


def _seconds(work: Callable[[], Any]) -> float:
    """Processor time of this thread's process: another process that takes the processor does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start
