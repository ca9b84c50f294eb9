# SPDX-License-Identifier: Apache-2.0
"""linear_attention on the device, forward: against the step-by-step recurrence in float64."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from linear_attention_calls import CHUNK, DECAYS, RULES, Inputs, make, relative
from torch import Tensor

from tilewright.ops import linear_attention, linear_attention_step_
from tilewright.ops.linear_attention import _in_segments
from tilewright.reference.linear_attention import recurrence

if TYPE_CHECKING:
    from conftest import Device

# Relative L2 error of values and states. On tensor cores an operand is rounded to the inputs' type in at most five
# places between an input and an output (state, residual, inverse, correction, score) and the output once more: the
# square root of 6 times half an ulp, times 1.25 for what the inverse adds up. float16 has three more bits.
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 7.5e-4}


def run(device: Device, inputs: Inputs, mode: Any = "chunk") -> tuple[Tensor, Tensor]:
    """Output and final state, back on the CPU."""
    x = inputs.map(device.tensor)
    device.seed(inputs.q.shape[1] % len(device.seeds))
    with torch.no_grad():
        o, state = linear_attention(
            x.q,
            x.k,
            x.v,
            beta=x.beta,
            g=x.g,
            rule=x.rule,
            initial_state=x.initial_state,
            output_final_state=True,
            cu_seqlens=x.cu_seqlens,
            mode=mode,
        )
    assert state is not None
    return o.cpu(), state.cpu()


def reference(inputs: Inputs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return recurrence(
        x.q, x.k, x.v, beta=x.beta, g=x.g, rule=x.rule, initial_state=x.initial_state, cu_seqlens=x.cu_seqlens
    )


def assert_agrees(device: Device, inputs: Inputs, mode: str = "chunk") -> None:
    """Values and states near the float64 recurrence, as near as the inputs' type allows."""
    o, state = run(device, inputs, mode)
    wanted = reference(inputs)
    assert o.dtype == inputs.v.dtype
    assert o.shape == wanted[0].shape
    for name, got, exact, plain in zip(("o", "state"), (o, state), wanted, reference_error(inputs), strict=True):
        # Twice what the same recurrence loses in torch, and no less than the rounding of the result.
        bound = BOUNDS.get(inputs.v.dtype) or max(2 * plain, 2.0 * torch.finfo(inputs.v.dtype).eps)
        error = relative(got, exact)
        assert error <= bound, f"{name}: relative error {error:.3g}, bound {bound:.3g}"


def reference_error(inputs: Inputs) -> tuple[float, float]:
    """What torch loses in the inputs' own type, where that is what the kernel computes in."""
    if inputs.v.dtype in BOUNDS:
        return 0.0, 0.0
    exact, plain = reference(inputs), reference(inputs, inputs.v.dtype)
    return relative(plain[0], exact[0]), relative(plain[1], exact[1])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_values_and_states_equal_the_recurrence(device: Device, rule: str, decay: str) -> None:
    sizes = [(0, 1, 64, 64), (1, 2, 64, 64), (CHUNK - 1, 6, 64, 64), (CHUNK, 2, 128, 64), (CHUNK + 1, 1, 64, 128)]
    # So many chunks that every stage of the ring is used again and again, the last one not full.
    sizes += [(8 * CHUNK + 10, 1, 64, 64)]
    if not device.is_emulator:
        sizes += [(1000, 2, 128, 128), (2 * CHUNK, 4, 64, 256)]
    for tokens, group, key, value in sizes:
        inputs = make(rule, decay, tokens, batch=2, group=group, key=key, value=value, strength=0.1, seed=tokens)
        assert_agrees(device, inputs)
        if tokens in (1, CHUNK + 1):
            assert_agrees(device, inputs, "recurrent")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_every_type(device: Device, rule: str, dtype: torch.dtype) -> None:
    for decay in DECAYS:
        inputs = make(rule, decay, CHUNK + 6, key=48, value=40, dtype=dtype)
        assert_agrees(device, inputs)


@pytest.mark.parametrize(("key", "value"), list(itertools.product((1, 16, 60, 64, 100, 128, 256), repeat=2)))
def test_every_head_size(device: Device, key: int, value: int) -> None:
    if device.is_emulator and key * value > 64 * 128:
        pytest.skip("as a GPU, the emulator takes it; it takes long")
    rule, decay = RULES[(key + value) % 2], DECAYS[(key // 4 + value) % 4]
    assert_agrees(device, make(rule, decay, CHUNK + 3, key=key, value=value, seed=key + value))


def test_keys_wider_than_the_kernel_name_the_way_out(device: Device) -> None:
    with pytest.raises(RuntimeError, match=r"q has K = 513, needed at most 512.*run on the CPU"):
        run(device, make("delta", "token", 2, key=513, value=8))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_are_each_its_own(device: Device, rule: str, decay: str) -> None:
    offsets = [0, CHUNK + 1, CHUNK + 1, 2 * CHUNK + 1, 2 * CHUNK + 9]
    if not device.is_emulator:
        offsets = [0, 410, 841, 841, 1135, 2126, 2512, 4096]
    tokens = offsets[-1] + 5
    inputs = make(rule, decay, tokens, heads=1, group=2, key=64, value=64, strength=0.05, offsets=offsets)
    # What stands behind a sequence is another one's, and may be anything.
    last = slice(offsets[-1], None)
    for x in (inputs.q, inputs.k, inputs.v):
        x[:, last] = torch.nan
    o, state = run(device, inputs)
    assert torch.equal(o[:, last], torch.zeros_like(o[:, last]))
    for n, (first, end) in enumerate(itertools.pairwise(offsets)):
        part = slice(first, end)
        assert inputs.initial_state is not None
        alone = Inputs(
            q=inputs.q[:, part],
            k=inputs.k[:, part],
            v=inputs.v[:, part],
            beta=None if inputs.beta is None else inputs.beta[:, part],
            g=inputs.g if inputs.g is None or inputs.g.dim() == 1 else inputs.g[:, part],
            initial_state=inputs.initial_state[n : n + 1],
            rule=rule,
        )
        got, final = run(device, alone)
        if end - first != 1:
            assert torch.equal(o[:, part], got)
            assert torch.equal(state[n : n + 1], final)
        assert_agrees(device, alone)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_segments_side_by_side_are_the_whole(device: Device, rule: Any, decay: str) -> None:
    inputs = make(rule, decay, 2 * CHUNK + 20 if device.is_emulator else 1000, group=2, strength=0.01)
    wanted = reference(inputs)
    x = inputs.map(device.tensor)
    with torch.no_grad():
        got = _in_segments(x.q, x.k, x.v, x.beta, x.g, rule, 64**-0.5, x.initial_state, CHUNK)
    for a, exact in zip(got, wanted, strict=True):
        assert relative(a.cpu(), exact) <= BOUNDS[torch.bfloat16]


def test_a_long_sequence_of_few_heads_is_cut(device: Device) -> None:
    if device.is_emulator:
        pytest.skip("how many blocks a device takes is the GPU's")
    inputs = make("delta", "token", 8192, group=2, key=128, value=128, strength=0.01)
    x = inputs.map(device.tensor)
    whole, state, _, _ = torch.ops.tilewright.linear_attention(
        x.q, x.k, x.v, x.beta, x.g, x.initial_state, None, 128**-0.5, True, False, False
    )
    o, final = run(device, inputs)
    # Two roundings of the same numbers.
    assert relative(o, whole.cpu()) <= 2 * BOUNDS[torch.bfloat16]
    assert relative(final, state.cpu()) <= 2 * BOUNDS[torch.bfloat16]


def test_long_sequences_go_in_stretches(device: Device) -> None:
    if device.is_emulator:
        pytest.skip("a stretch has a gigabyte of memory")
    tokens, heads = 30000, 64
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(1, tokens, heads, size, generator=rng, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(128), normal(128), normal(64)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -0.01 * torch.rand(1, tokens, heads, 128, generator=rng, device="cuda")
    results = []
    # A packed sequence has all the memory that it needs.
    for offsets in (None, torch.tensor([0, tokens], device="cuda")):
        with torch.no_grad():
            o, state = linear_attention(q, k, v, g=g, output_final_state=True, cu_seqlens=offsets)
        assert state is not None
        results.append((o, state))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_gates_from_nothing_to_everything(device: Device, rule: str, decay: str) -> None:
    inputs = make(rule, decay, 2 * CHUNK + 7, seed=3)
    assert inputs.g is not None
    for values in ([0.0], [-50.0], [-torch.inf], [0.0, -50.0, -torch.inf, -1e-3], [-torch.inf, *[-1e-3] * 40]):
        cycle = torch.tensor(values).repeat(1 + inputs.g.numel() // len(values))
        assert_agrees(device, replace(inputs, g=cycle[: inputs.g.numel()].view_as(inputs.g)))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_same_signs_add_up(device: Device, rule: str, decay: str) -> None:
    """Nothing cancels: sums are as large as they get, and so are the errors of adding up in too few bits."""
    inputs = make(rule, decay, 2 * CHUNK if device.is_emulator else 2048, strength=1e-3)
    assert_agrees(device, replace(inputs, q=inputs.q.abs(), k=inputs.k.abs(), v=inputs.v.abs()))


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_strides_do_not_matter(device: Device, rule: str, decay: str) -> None:
    inputs = make(rule, decay, CHUNK + 9, batch=2, heads=2, key=64, value=72)
    wanted = run(device, inputs)

    def head_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x

    def scattered(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0]

    def misaligned(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
        wide[..., 1 : x.shape[-1] + 1] = x
        return wide[..., 1 : x.shape[-1] + 1]

    for change in (head_first, scattered):
        for got, exact in zip(run(device, inputs.map(change)), wanted, strict=True):
            assert torch.equal(got, exact)
    assert_agrees(device, inputs.map(misaligned))


@pytest.mark.sanitize
@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_small_calls_under_a_sanitizer(device: Device, rule: str, decay: str) -> None:
    inputs = make(rule, decay, 4 * CHUNK + 9, heads=1, group=2, key=128, value=128, offsets=[0, 70, 70, 3 * CHUNK])
    assert_agrees(device, inputs)


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_every_time(device: Device, rule: str, decay: str) -> None:
    tokens = CHUNK + 9 if device.is_emulator else 1000
    inputs = make(rule, decay, tokens, heads=1, group=2, key=128, value=128)
    wanted = run(device, inputs)
    for seed in device.seeds if device.is_emulator else range(20):
        device.seed(seed)
        for got, exact in zip(run(device, inputs), wanted, strict=True):
            assert torch.equal(got, exact)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_nan_stays_in_its_sequence_and_head(device: Device, decay: str, name: str) -> None:
    inputs = make("delta", decay, 3 * CHUNK, heads=2, offsets=[0, 50, 130, 192])
    clean = run(device, inputs)
    dirty = inputs.map(Tensor.clone)
    getattr(dirty, name)[0, 70, 1] = torch.nan
    o, state = run(device, dirty)
    assert o[0, 70, 1].isnan().any()
    others = torch.ones(3 * CHUNK, 2, dtype=torch.bool)
    others[50:130, 1] = False
    assert torch.equal(o[0][others], clean[0][0][others])
    untouched = torch.ones(3, 2, dtype=torch.bool)
    untouched[1, 1] = False
    assert torch.equal(state[untouched], clean[1][untouched])


def test_no_initial_state_and_no_sequences(device: Device) -> None:
    inputs = replace(make("delta", "token", CHUNK + 5), initial_state=None)
    assert_agrees(device, inputs)
    nothing = replace(make("delta", "token", 4), initial_state=None, cu_seqlens=torch.tensor([0]))
    o, state = run(device, nothing)
    assert torch.equal(o, torch.zeros_like(o))
    assert state.shape == (0, 1, 64, 64)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_mixed_types_are_computed_in_the_widest(device: Device, mode: str) -> None:
    inputs = make("delta", "token", 20, key=16, value=16, dtype=torch.float32)
    mixed = replace(inputs, q=inputs.q.to(torch.bfloat16))
    o, _ = run(device, mixed, mode)
    assert o.dtype == torch.float32
    assert relative(o, reference(mixed)[0]) <= 1e-5


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_updates_the_pool_in_place(device: Device, rule: Any, decay: str) -> None:
    sizes = [(64, 64), (20, 70)] if device.is_emulator else [(128, 128), (64, 64), (20, 70), (256, 256)]
    for key, value in sizes:
        inputs = make(rule, decay, 3, batch=2, heads=1, group=2, key=key, value=value, seed=key)
        rows = torch.tensor([3, 0])
        pool = torch.randn(5, 2, key, value, generator=torch.Generator().manual_seed(1))
        wanted, final = reference(replace(inputs, initial_state=pool[rows]))
        before = pool.clone()
        x = inputs.map(device.tensor)
        states = device.tensor(pool)
        for t in range(3):
            step = slice(t, t + 1)
            got = linear_attention_step_(
                x.q[:, step],
                x.k[:, step],
                x.v[:, step],
                states,
                beta=None if x.beta is None else x.beta[:, step],
                g=x.g if x.g is None or x.g.dim() == 1 else x.g[:, step],
                rule=rule,
                state_indices=device.tensor(rows),
            )
            # The arithmetic is float32, so only the output's rounding counts: half an ulp of bfloat16.
            assert relative(got.cpu(), wanted[:, step]) <= 2.0**-8
        after = states.cpu()
        assert relative(after[rows], final) <= 1e-5
        assert torch.equal(after[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.sanitize
def test_a_row_that_does_not_exist_gives_nan(device: Device) -> None:
    inputs = make("delta", "token", 1, batch=3)
    pool = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    x, states = inputs.map(device.tensor), device.tensor(pool.clone())
    rows = device.tensor(torch.tensor([-1, 1, 2]))
    o = linear_attention_step_(x.q, x.k, x.v, states, beta=x.beta, g=x.g, rule="delta", state_indices=rows).cpu()
    assert o[[0, 2]].isnan().all()
    assert not o[1].isnan().any()
    after = states.cpu()
    assert torch.equal(after[0], pool[0])
    assert not torch.equal(after[1], pool[1])


def test_a_wider_type_keeps_the_pool_in_float32(device: Device) -> None:
    inputs = make("delta", "token", 1, batch=2, dtype=torch.float64)
    assert inputs.initial_state is not None
    x, states = inputs.map(device.tensor), device.tensor(inputs.initial_state.float())
    o = linear_attention_step_(x.q, x.k, x.v, states, beta=x.beta, g=x.g, rule="delta").cpu()
    assert o.dtype == torch.float64
    assert relative(o, reference(inputs)[0]) <= 1e-5


def test_errors_name_the_argument(device: Device) -> None:
    inputs = make("delta", "token", 4, key=8, value=8)
    for change, message in (
        ({"k": torch.zeros(1, 4, 1, 5, dtype=torch.bfloat16)}, "k has shape .* must be that of q = 8"),
        ({"g": torch.zeros(1, 4, 1, 5)}, "g has shape .* must be K = 8"),
        ({"beta": None}, "beta is missing"),
        ({"initial_state": torch.zeros(2, 1, 8, 8)}, "initial_state has shape .* must be N = 1"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens has dtype Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(device, replace(inputs, **change))


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_a_graph_replays_with_new_inputs_and_offsets(device: Device, decay: str) -> None:
    if device.is_emulator:
        pytest.skip("graphs are the GPU's")
    offsets = [[0, 100, 300], [0, 257, 290]]
    calls = [make("delta", decay, 300, heads=2, key=128, value=128, offsets=at, seed=i) for i, at in enumerate(offsets)]
    wanted = [run(device, inputs) for inputs in calls]
    x = calls[0].map(device.tensor)

    def call() -> tuple[Tensor, Tensor | None]:
        return linear_attention(
            x.q,
            x.k,
            x.v,
            beta=x.beta,
            g=x.g,
            rule="delta",
            initial_state=x.initial_state,
            output_final_state=True,
            cu_seqlens=x.cu_seqlens,
        )

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad(), torch.cuda.graph(graph):
        o, state = call()
    assert state is not None
    for inputs, exact in zip(calls, wanted, strict=True):
        for f in fields(inputs):
            if isinstance(new := getattr(inputs, f.name), Tensor):
                getattr(x, f.name).copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o.cpu(), exact[0])
        assert torch.equal(state.cpu(), exact[1])
