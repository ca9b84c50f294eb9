# SPDX-License-Identifier: Apache-2.0
"""Gradients of linear_attention on the device, against autograd through the step-by-step recurrence in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from linear_attention_calls import CHUNK, DECAYS, RULES, Inputs, make, relative
from torch import Tensor

from tilewright.ops import linear_attention
from tilewright.reference.linear_attention import recurrence

if TYPE_CHECKING:
    from conftest import Device

NARROW = (torch.bfloat16, torch.float16)
# float64: a sum of some hundred products with an error of 2^-53 each; the decays' exponentials cost a few more.
EXACT = 1e-12
# Relative L2 error on tensor cores. Between an input and a gradient an operand is rounded to the inputs' type in eight
# places at most (inverse, state, its gradient, residual, what was written, its gradient, scores, theirs) and the
# result once more; each time half an ulp of 2^-8 or 2^-11 at most, 0.58 of that on average: the square root of 9 times
# that is 3.4e-3, and twice that for what the inverse adds up. float16 has three more bits.
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def gradients(inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor | None]], **options: bool) -> list[Tensor]:
    """Of every leaf, by whatever computes the recurrence, back on the CPU."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves().items()}
    o, state = function(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        beta=leaves.get("beta"),
        g=leaves.get("g"),
        rule=inputs.rule,
        initial_state=leaves["initial_state"],
        cu_seqlens=inputs.cu_seqlens,
        **options,
    )
    assert state is not None
    assert inputs.d_out is not None
    assert inputs.d_state is not None
    found = torch.autograd.grad(
        [o, state],
        list(leaves.values()),
        [inputs.d_out.to(o.dtype), inputs.d_state.to(state.dtype)],
        allow_unused=True,
    )
    return [torch.zeros_like(x) if d is None else d for d, x in zip(found, leaves.values(), strict=True)]


def on_device(device: Device, inputs: Inputs) -> list[Tensor]:
    return [d.cpu() for d in gradients(inputs.map(device.tensor), linear_attention, output_final_state=True)]


def gate_floor(inputs: Inputs, wanted: list[Tensor]) -> float:
    """What dg is made of: sums of q dq and k dk over the later tokens of a chunk. Rounding errors scale with these."""
    terms = sum((x.double() * d.double()).abs().sum((2, 3)) for x, d in zip((inputs.q, inputs.k), wanted, strict=False))
    assert isinstance(terms, Tensor)
    chunks = torch.nn.functional.pad(terms, (0, -terms.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    later = chunks.flip(-1).cumsum(-1)
    return float(later.sum() if inputs.g is not None and inputs.g.dim() == 1 else later.norm())


def assert_agrees(device: Device, inputs: Inputs, forgets: bool = False) -> None:
    """Every gradient near autograd's in float64, as near as the inputs' type and arithmetic allow.

    forgets: decays are so strong that dg is next to nothing beside the terms whose difference it is.
    """
    dtype = inputs.q.dtype
    wanted = gradients(inputs.to(torch.float64), recurrence)
    got = on_device(device, inputs)
    in_torch = gradients(inputs, recurrence) if dtype == torch.float32 else wanted
    for (name, leaf), a, exact, plain in zip(inputs.leaves().items(), got, wanted, in_torch, strict=True):
        assert a.dtype == leaf.dtype
        assert a.shape == leaf.shape
        # 16 bits of one decay for all tokens: a sum of differences of both signs, not a number of its own size.
        floored = name == "g" and (dtype not in NARROW or leaf.dim() == 1 or forgets)
        # What float32 cannot hold is zero.
        floor = gate_floor(inputs, wanted) if floored else 0.0 if dtype == torch.float64 else 1e-37
        # Twice what the same recurrence loses in torch, and no less than the rounding of the result.
        bound = BOUNDS.get(dtype) or (EXACT if dtype == torch.float64 else max(2 * relative(plain, exact, floor), 2e-6))
        error = relative(a, exact, floor)
        assert error <= bound, f"d{name}: relative error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_the_recurrence_in_float64(device: Device, rule: str, decay: str) -> None:
    sizes = [(1, 1, 1, 1, 16), (3, 2, 2, 5, 34), (CHUNK + 2, 1, 1, 33, 3)]
    if not device.is_emulator:
        sizes += [(19, 2, 2, 5, 3), (CHUNK, 1, 4, 64, 64), (200, 2, 1, 128, 256), (77, 1, 2, 256, 100)]
    for tokens, heads, group, key, value in sizes:
        inputs = make(
            rule, decay, tokens, heads=heads, group=group, key=key, value=value, dtype=torch.float64, seed=tokens
        )
        assert_agrees(device, inputs)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_float32_is_as_good_as_the_same_arithmetic_in_torch(device: Device, rule: str, decay: str) -> None:
    tokens, size = (9, 12) if device.is_emulator else (130, 128)
    assert_agrees(device, make(rule, decay, tokens, group=2, key=size, value=size, dtype=torch.float32))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bits(device: Device, rule: str, decay: str, dtype: torch.dtype) -> None:
    sizes = [(CHUNK + 6, 1, 1, 40, 72)]
    if not device.is_emulator:
        sizes += [(1, 1, 1, 64, 64), (CHUNK, 2, 2, 128, 128), (250, 2, 2, 128, 128), (130, 1, 4, 64, 256)]
    for tokens, heads, group, key, value in sizes:
        inputs = make(
            rule, decay, tokens, heads=heads, group=group, key=key, value=value, strength=0.2, dtype=dtype, seed=tokens
        )
        assert_agrees(device, inputs)


@pytest.mark.parametrize(("key", "value"), [(20, 64), (64, 20), (160, 64)])
def test_sizes_that_tensor_cores_do_not_take(device: Device, key: int, value: int) -> None:
    assert_agrees(device, make("delta", "token", 9 if device.is_emulator else 130, group=2, key=key, value=value))


@pytest.mark.parametrize("strength", [50.0, 700.0])
@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_decays_that_underflow(device: Device, rule: str, decay: str, strength: float) -> None:
    for dtype, tokens, size in ((torch.float64, 9 if device.is_emulator else 70, 8), (torch.bfloat16, 70, 64)):
        inputs = make(rule, decay, tokens, key=size, value=size, strength=strength, dtype=dtype)
        assert_agrees(device, inputs, forgets=True)


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_gates_that_forget_everything(device: Device, rule: str, decay: str) -> None:
    inputs = make(rule, decay, CHUNK + 6, strength=0.1)
    assert inputs.g is not None
    inputs.g[:, ::3] = 0.0
    inputs.g[:, [20, 66]] = -torch.inf
    got = on_device(device, inputs)
    assert all(d.isfinite().all() for d in got)
    finite = replace(inputs, g=inputs.g.clamp(min=-1000.0))
    assert all(torch.equal(a, b) for a, b in zip(got, on_device(device, finite), strict=True))
    assert_agrees(device, finite)


@pytest.mark.parametrize("rule", RULES)
def test_a_thousand_tokens(device: Device, rule: str) -> None:
    if device.is_emulator:
        pytest.skip("too long for the emulator")
    assert_agrees(device, make(rule, "token", 1000, heads=2, group=2, key=128, value=128, strength=0.1))


@pytest.mark.parametrize("rule", RULES)
def test_same_sign_inputs(device: Device, rule: str) -> None:
    inputs = make(rule, "token", 70 if device.is_emulator else 250, strength=0.5)
    changed = {n: getattr(inputs, n).abs() for n in ("q", "k", "v", "initial_state", "d_out", "d_state")}
    assert_agrees(device, replace(inputs, **changed))


@pytest.mark.sanitize
def test_beta_of_zero_and_of_two(device: Device) -> None:
    inputs = make("delta", "token", 70, strength=0.1)
    assert inputs.beta is not None
    inputs.beta[:, ::2] = 0.0
    inputs.beta[:, 1::4] = 2.0
    assert_agrees(device, inputs)


LENGTHS = [1, 0, CHUNK + 5, 9]


@pytest.mark.parametrize(
    ("decay", "dtype"),
    [("token", torch.bfloat16), ("none", torch.bfloat16), ("channel", torch.bfloat16), ("channel", torch.float32)],
)
@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_equal_the_loop_bit_for_bit(device: Device, rule: str, decay: str, dtype: torch.dtype) -> None:
    lengths = (LENGTHS if dtype in NARROW else [1, 0, 9, 3]) if device.is_emulator else [*LENGTHS, 3 * CHUNK]
    size = 64 if dtype in NARROW else 9
    offsets = [0, *itertools.accumulate(lengths)]
    inputs = make(
        rule,
        decay,
        offsets[-1] + 4,
        group=1 if device.is_emulator else 2,
        key=size,
        value=size,
        offsets=offsets,
        dtype=dtype,
        strength=0.1,
    )
    inputs.d_out[:, offsets[-1] :] = 0
    assert_agrees(device, inputs)
    together = on_device(device, inputs)
    for n, (first, last) in enumerate(itertools.pairwise(offsets)):
        names = ("q", "k", "v", "beta", "g", "d_out")
        parts = {name: x[:, first:last] for name in names if (x := getattr(inputs, name)) is not None}
        states = {name: getattr(inputs, name)[n : n + 1] for name in ("initial_state", "d_state")}
        one = replace(inputs, **parts, **states, cu_seqlens=None)
        for name, a, b in zip(inputs.leaves(), together, on_device(device, one), strict=True):
            part = a[n : n + 1] if name == "initial_state" else a[:, first:last]
            assert torch.equal(part, b), (n, name)
    for name, d in zip(inputs.leaves(), together, strict=True):
        assert name == "initial_state" or not d[:, offsets[-1] :].any(), name


def test_nan_stays_in_its_sequence_and_head(device: Device) -> None:
    offsets = [0, 20, 40, 60]
    inputs = make("delta", "token", 60, heads=2, offsets=offsets, strength=0.1)
    clean = on_device(device, inputs)
    for name in ("k", "g", "d_out") if device.is_emulator else ("q", "k", "v", "g", "d_out"):
        dirty = inputs.map(torch.clone)
        getattr(dirty, name)[0, 25, 1] = torch.nan
        got = on_device(device, dirty)
        others = torch.ones(60, 2, dtype=torch.bool)
        others[20:40, 1] = False
        for leaf, a, b in zip(inputs.leaves(), got, clean, strict=True):
            if leaf == "initial_state":
                assert torch.equal(a[[0, 2]], b[[0, 2]])
            else:
                assert torch.equal(a[0][others], b[0][others]), (name, leaf)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens(device: Device, rule: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        inputs = make(rule, "token", 0, batch=2, dtype=dtype)
        got = dict(zip(inputs.leaves(), on_device(device, inputs), strict=True))
        assert torch.equal(got["initial_state"], inputs.d_state)
        assert got["q"].shape == inputs.q.shape


@pytest.mark.sanitize
def test_strides_do_not_matter(device: Device) -> None:
    inputs = make("delta", "token", CHUNK + 1, heads=2, strength=0.1)

    def strided(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x

    def scattered(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0]

    wanted = on_device(device, inputs)
    for change in (strided, scattered):
        assert all(torch.equal(a, b) for a, b in zip(on_device(device, inputs.map(change)), wanted, strict=True))


def test_unused_outputs_have_no_gradient_of_their_own(device: Device) -> None:
    inputs = make("delta", "token", 20, strength=0.1).map(device.tensor)
    q, state0 = (x.detach().requires_grad_() for x in (inputs.q, inputs.initial_state))
    o, state = linear_attention(
        q, inputs.k, inputs.v, beta=inputs.beta, g=inputs.g, rule="delta", initial_state=state0, output_final_state=True
    )
    assert state is not None
    d_q, d_state = torch.autograd.grad(state.sum(), [q, state0], retain_graph=True)
    assert not d_q.any()
    assert d_state.abs().sum() > 0
    assert torch.autograd.grad(o.float().sum(), [q])[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("decay", "dtype"), [("token", torch.bfloat16), ("channel", torch.bfloat16), ("channel", torch.float32)]
)
def test_bits_do_not_depend_on_the_order_of_threads(device: Device, decay: str, dtype: torch.dtype) -> None:
    tokens, size = (CHUNK + 6 if dtype in NARROW else 9, 64) if device.is_emulator else (2000, 128)
    inputs = make(
        "delta",
        decay,
        tokens,
        heads=1 if device.is_emulator else 8,
        group=1 if device.is_emulator else 2,
        key=size,
        value=size,
        dtype=dtype,
    )
    results = []
    for seed in device.seeds if device.is_emulator else range(20):
        device.seed(seed)
        results.append(on_device(device, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(device: Device, decay: str) -> None:
    if device.is_emulator:
        pytest.skip("in the emulator tensors are the CPU's, and so is what torch expects of them")
    inputs = make("delta", decay, 70, group=2).map(device.tensor)
    q, k, v, state = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.initial_state))
    arguments = (q, k, v, inputs.beta, inputs.g, state, None, 0.125, True, False, True)
    torch.library.opcheck(torch.ops.tilewright.linear_attention.default, arguments)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(device: Device, rule: str, decay: str) -> None:
    inputs = make(rule, decay, 7, group=2, key=3, value=2, dtype=torch.float64).map(device.tensor)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves().items()}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, tensors, strict=True))
        o, state = linear_attention(
            named["q"],
            named["k"],
            named["v"],
            beta=named.get("beta"),
            g=named.get("g"),
            rule=rule,  # type: ignore[arg-type]
            initial_state=named["initial_state"],
            output_final_state=True,
        )
        assert state is not None
        return o, state

    assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)


def test_a_graph_captures_it(device: Device) -> None:
    if device.is_emulator:
        pytest.skip("there are no graphs in the emulator")
    inputs = make("delta", "token", 300, heads=2, group=2, key=128, value=128, offsets=[0, 100, 300]).map(device.tensor)
    wanted = gradients(inputs, linear_attention, output_final_state=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(inputs, linear_attention, output_final_state=True)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(inputs, linear_attention, output_final_state=True)
    for d in got:
        d.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_errors_name_the_argument(device: Device) -> None:
    inputs = make("delta", "token", 4).map(device.tensor)
    none = inputs.v.new_empty(0, 0, 1, 64)

    def call(**changed: Tensor) -> None:
        a = {"q": inputs.q, "k": inputs.k, "checkpoints": inputs.initial_state, "d_out": inputs.d_out, **changed}
        torch.ops.tilewright.linear_attention_backward(
            a["q"], a["k"], inputs.v, inputs.beta, inputs.g, None, a["checkpoints"], none, a["d_out"], inputs.d_state,
            0.125, True,
        )  # fmt: skip

    call()
    wide = torch.zeros(1, 4, 1, 264, dtype=torch.bfloat16, device=inputs.q.device)
    with pytest.raises(RuntimeError, match=r"q has K = 264 .* needed 1 to 256"):
        call(q=wide, k=wide)
    with pytest.raises(RuntimeError, match=r"d_out has shape \[1, 4, 1, 63\]"):
        call(d_out=inputs.d_out[..., :63])
    with pytest.raises(RuntimeError, match="checkpoints has 3 states"):
        call(checkpoints=torch.zeros(3, 1, 64, 64, device=inputs.q.device))
