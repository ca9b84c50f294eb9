# SPDX-License-Identifier: Apache-2.0
"""linear_attention against the step-by-step recurrence in float64: values, states and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_attention_cases import (
    DECAYS,
    RULES,
    assert_agrees,
    gate_floor,
    kernel,
    make,
    names,
    oracle,
    relative,
    run,
)
from torch import Tensor

from tilewright.ops import linear_attention, linear_attention_step_, state_transition
from tilewright.reference.linear_attention import recurrence
from tilewright.testing import isa_level, isa_levels

# float64: a sum of a few hundred products, each with an error of 2^-53; the decays' exponentials cost a few more.
EXACT = 1e-12
# The chunk of every decay, and a segment between two kept states.
CHUNK, SEGMENT = 32, 256


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients_equal_the_recurrence(rule: str, decay: str, level: str) -> None:
    for tokens, key, value, heads, value_heads in [
        (1, 16, 16, 1, 1),
        (CHUNK // 2 - 1, 5, 3, 1, 2),
        (CHUNK - 1, 16, 33, 2, 2),
        (CHUNK, 60, 1, 1, 1),
        (CHUNK + 1, 1, 16, 1, 4),
        (77, 20, 7, 1, 1),
        (SEGMENT + 33, 17, 18, 1, 1),
    ]:
        inputs = make(rule, decay, tokens, heads=heads, value_heads=value_heads, key=key, value=value, seed=tokens)
        wanted = oracle(inputs)
        assert_agrees(inputs, kernel(inputs), wanted, EXACT)
        with torch.no_grad():
            o, state = linear_attention(
                inputs.q,
                inputs.k,
                inputs.v,
                beta=inputs.beta,
                g=inputs.g,
                rule=rule,
                initial_state=inputs.initial_state,
                output_final_state=True,
                mode="recurrent",
            )
        assert relative(o, wanted[0]) <= EXACT
        assert state is not None
        assert relative(state, wanted[1]) <= EXACT


@pytest.mark.parametrize(("key", "value"), list(itertools.product((1, 16, 60, 64, 100, 128, 256), repeat=2)))
def test_every_head_size(key: int, value: int) -> None:
    rule, decay = RULES[(key + value) % 2], DECAYS[(key // 4 + value) % 4]
    inputs = make(rule, decay, CHUNK + 3, key=key, value=value, seed=key + value)
    assert_agrees(inputs, kernel(inputs), oracle(inputs), EXACT)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_float32_is_as_good_as_the_same_arithmetic_in_torch(rule: str, decay: str) -> None:
    inputs = make(rule, decay, 100, heads=2, value_heads=2, key=60, value=64)
    narrow = inputs.to(torch.float32)
    wanted = oracle(narrow)
    plain = run(narrow, recurrence)
    for name, got, in_torch, exact in zip(names(narrow), kernel(narrow), plain, wanted, strict=True):
        floor = gate_floor(narrow, wanted) if name == "dg" else 0.0
        # Twice torch's own error, and no less than the rounding of the result itself.
        bound = max(2 * relative(in_torch, exact, floor), 2.0**-22)
        assert relative(got, exact, floor) <= bound, name


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_thousand_tokens(rule: str, decay: str) -> None:
    inputs = make(rule, decay, 1000, key=12, value=12, strength=0.1)
    assert_agrees(inputs, kernel(inputs), oracle(inputs), EXACT)


@pytest.mark.parametrize("strength", [50.0, 700.0])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_decays_that_underflow(rule: str, decay: str, strength: float) -> None:
    inputs = make(rule, decay, 70, key=8, value=8, strength=strength)
    assert_agrees(inputs, kernel(inputs), oracle(inputs), EXACT)
    narrow = inputs.to(torch.float32)
    assert_agrees(narrow, kernel(narrow), oracle(narrow), 1e-5)


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_exactly_zero_and_one(rule: str, decay: str, dtype: torch.dtype) -> None:
    inputs = make(rule, decay, 50, key=8, value=8, dtype=dtype)
    assert inputs.g is not None
    with torch.no_grad():
        inputs.g[:, ::3] = 0.0
        inputs.g[:, 20] = -torch.inf
        inputs.g[:, 33] = -torch.inf
    got = kernel(inputs)
    assert all(x.isfinite().all() for x in got)
    # The token after a full reset knows nothing of what came before.
    alone = linear_attention(
        inputs.q[:, 33:],
        inputs.k[:, 33:],
        inputs.v[:, 33:],
        beta=None if inputs.beta is None else inputs.beta[:, 33:],
        g=inputs.g[:, 33:],
        rule=rule,
    )[0]
    assert relative(got[0][:, 33:], alone) <= (1e-5 if dtype == torch.float32 else EXACT)


def test_a_full_reset_costs_the_tokens_after_it_no_precision() -> None:
    inputs = make("delta", "channel", 16, key=16, value=16, strength=0.05, dtype=torch.float32)
    assert inputs.g is not None
    with torch.no_grad():
        inputs.g[:, 3] = -5000.0
    assert_agrees(inputs, kernel(inputs), oracle(inputs), 2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_same_sign_inputs(rule: str) -> None:
    inputs = make(rule, "token", 130, key=64, value=64, dtype=torch.float32)
    ones = {n: getattr(inputs, n).abs() for n in ("q", "k", "v", "initial_state", "d_out", "d_state")}
    positive = type(inputs)(**{**inputs.__dict__, **ones})
    assert_agrees(positive, kernel(positive), oracle(positive), 5e-6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_hundred_thousand_steps_stay_bounded(rule: str, decay: str) -> None:
    tokens = 100_000
    inputs = make(rule, decay, tokens, key=16, value=16, strength=0.5, dtype=torch.float32)
    beta = None if inputs.beta is None else inputs.beta / 2
    chunked, state = linear_attention(
        inputs.q, inputs.k, inputs.v, beta=beta, g=inputs.g, rule=rule, output_final_state=True
    )
    stepped, other = linear_attention(
        inputs.q.double(),
        inputs.k.double(),
        inputs.v.double(),
        beta=None if beta is None else beta.double(),
        g=None if inputs.g is None else inputs.g.double(),
        rule=rule,
        output_final_state=True,
        mode="recurrent",
    )
    assert state is not None
    assert other is not None
    # Without decay errors of the additive state add up like a random walk of T roundings.
    bound = 2.0**-24 * (tokens**0.5 if rule == "additive" and decay == "none" else 64)
    assert relative(state, other) <= bound
    assert relative(chunked, stepped) <= bound


def _packed_and_looped(rule: str, decay: str, offsets: list[int], tokens: int, dtype: torch.dtype) -> None:
    packed = make(rule, decay, tokens, value_heads=2, key=9, value=10, cu_seqlens=offsets, dtype=dtype)
    with torch.no_grad():
        packed.d_out[:, offsets[-1] :] = 0
    together = kernel(packed)
    for n, (first, last) in enumerate(itertools.pairwise(offsets)):

        def piece(x: Tensor | None, first: int = first, last: int = last) -> Tensor | None:
            return x if x is None or x.dim() == 1 else x[:, first:last]

        one = type(packed)(
            **{
                **packed.__dict__,
                **{name: piece(getattr(packed, name)) for name in ("q", "k", "v", "beta", "g", "d_out")},
                "initial_state": packed.initial_state[n : n + 1],
                "d_state": packed.d_state[n : n + 1],
                "cu_seqlens": None,
            }
        )
        alone = kernel(one)
        for name, a, b in zip(names(packed), together, alone, strict=True):
            part = a[n : n + 1] if name in ("state", "dinitial") else a[:, first:last]
            assert torch.equal(part, b), (n, name)
    assert torch.equal(together[0][:, offsets[-1] :], torch.zeros_like(together[0][:, offsets[-1] :]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 70, 257]), min_size=1, max_size=5),
    slack=st.sampled_from([0, 3]),
    rule=st.sampled_from(RULES),
    decay=st.sampled_from(["none", "token", "channel"]),
)
def test_packed_sequences_equal_the_loop_bit_for_bit(lengths: list[int], slack: int, rule: str, decay: str) -> None:
    offsets = [0, *itertools.accumulate(lengths)]
    _packed_and_looped(rule, decay, offsets, offsets[-1] + slack, torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_and_no_sequences(rule: str) -> None:
    empty = make(rule, "token", 0, batch=2, key=4, value=3)
    got = kernel(empty)
    assert got[0].shape == (2, 0, 1, 3)
    assert torch.equal(got[1], empty.initial_state)
    assert torch.equal(got[-1], empty.d_state)
    none = make(rule, "token", 5, batch=0, key=4, value=3)
    assert kernel(none)[0].shape == (0, 5, 1, 3)
    packed = make(rule, "token", 4, key=4, value=3, cu_seqlens=[0])
    assert torch.equal(kernel(packed)[0], torch.zeros(1, 4, 1, 3, dtype=torch.float64))


def test_nan_stays_in_its_sequence_and_head() -> None:
    inputs = make("delta", "channel", 60, heads=2, value_heads=2, key=8, value=8, cu_seqlens=[0, 20, 40, 60])
    clean = kernel(inputs)
    for name in ("q", "k", "v", "g"):
        dirty = inputs.to(torch.float64)
        with torch.no_grad():
            getattr(dirty, name)[0, 25, 1] = torch.nan
        got = kernel(dirty)
        assert got[0][0, 25, 1].isnan().any()
        others = torch.ones(60, 2, dtype=torch.bool)
        others[20:40, 1] = False
        assert torch.equal(got[0][0][others], clean[0][0][others]), name


def test_strides_do_not_matter() -> None:
    inputs = make("delta", "channel", 40, batch=2, heads=2, value_heads=2, key=6, value=5)

    def strided(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def scattered(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0]

    wanted = kernel(inputs)
    for change in (strided, scattered):
        fields = {n: change(getattr(inputs, n)) for n in ("q", "k", "v", "beta", "g", "d_out")}
        for got, exact in zip(kernel(type(inputs)(**{**inputs.__dict__, **fields})), wanted, strict=True):
            assert torch.equal(got, exact)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_threads_do_not_change_the_bits(mode: str) -> None:
    inputs = make("delta", "token", 70, heads=1, value_heads=1, key=32, value=128, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                o, state = linear_attention(
                    inputs.q,
                    inputs.k,
                    inputs.v,
                    beta=inputs.beta,
                    g=inputs.g,
                    rule="delta",
                    output_final_state=True,
                    mode=mode,
                )
            assert state is not None
            results.append((o, state, *kernel(inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_levels_agree(decay: str) -> None:
    inputs = make("delta", decay, 90, key=40, value=24, dtype=torch.float32)
    wanted = oracle(inputs)
    for name in isa_levels():
        with isa_level(name):
            assert_agrees(inputs, kernel(inputs), wanted, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    narrow = make("delta", "token", 90, key=16, value=16, dtype=torch.float32).to(dtype)
    wide = kernel(narrow.to(torch.float32))
    got = kernel(narrow)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert torch.equal(got[0], wide[0].to(dtype))
    assert torch.equal(got[1], wide[1])
    for a, b in zip(got[2:], wide[2:], strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule: str, decay: str) -> None:
    inputs = make(rule, decay, 19, heads=1, value_heads=2, key=3, value=2)
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(tensors)
        q, k, v = next(rest), next(rest), next(rest)
        beta = next(rest) if rule == "delta" else None
        g = next(rest) if decay != "none" else None
        o, state = linear_attention(
            q, k, v, beta=beta, g=g, rule=rule, initial_state=next(rest), output_final_state=True
        )
        assert state is not None
        return o, state

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(decay: str) -> None:
    inputs = make("delta", decay, 40, batch=2, heads=1, value_heads=2, key=8, value=6, dtype=torch.float32)
    q, k, v, state = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.initial_state))
    arguments = (q, k, v, inputs.beta, inputs.g, state, None, 0.5, True, False, True)
    torch.library.opcheck(torch.ops.tilewright.linear_attention.default, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed: bool) -> None:
    offsets = [0, 10, 10, 40] if packed else None
    inputs = make(
        "delta", "channel", 40, heads=1, value_heads=2, key=8, value=6, cu_seqlens=offsets, dtype=torch.float32
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, state = linear_attention(
            q, k, v, beta=inputs.beta, g=inputs.g, rule="delta", output_final_state=True, cu_seqlens=inputs.cu_seqlens
        )
        assert state is not None
        return o.square().sum() + state.sum()

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        results.append(torch.autograd.grad(call(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unused_outputs_have_no_gradient_of_their_own() -> None:
    inputs = make("delta", "token", 20, key=4, value=4)
    q = inputs.q.detach().requires_grad_()
    state0 = inputs.initial_state.detach().requires_grad_()
    o, state = linear_attention(
        q, inputs.k, inputs.v, beta=inputs.beta, g=inputs.g, rule="delta", initial_state=state0, output_final_state=True
    )
    assert state is not None
    d_q, d_state = torch.autograd.grad(state.sum(), [q, state0], retain_graph=True)
    assert torch.equal(d_q, torch.zeros_like(q))
    assert d_state.abs().sum() > 0
    assert torch.autograd.grad(o.sum(), [q])[0].abs().sum() > 0


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_segments_combine_to_the_whole(rule: str, decay: str) -> None:
    inputs = make(rule, decay, 8 * 37, key=16, value=12, strength=0.2)
    whole = linear_attention(
        inputs.q, inputs.k, inputs.v, beta=inputs.beta, g=inputs.g, rule=rule, output_final_state=True
    )[1]
    state = torch.zeros_like(inputs.initial_state)
    for first in range(0, 8 * 37, 37):
        part = slice(first, first + 37)
        transition, written = state_transition(
            inputs.k[:, part],
            v=inputs.v[:, part],
            beta=None if inputs.beta is None else inputs.beta[:, part],
            g=inputs.g if inputs.g is None or inputs.g.dim() == 1 else inputs.g[:, part],
            rule=rule,
        )
        state = transition @ state + written
    assert whole is not None
    assert relative(state, whole) <= EXACT


@pytest.mark.parametrize("indices", [None, [3, 0]])
def test_a_step_updates_the_pool_in_place(indices: list[int] | None) -> None:
    inputs = make("delta", "token", 3, batch=2, heads=1, value_heads=2, key=8, value=70, dtype=torch.float32)
    rows = [0, 1] if indices is None else indices
    pool = torch.randn(2 if indices is None else 5, 2, 8, 70)
    before = pool.clone()
    wanted, states = linear_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        beta=inputs.beta,
        g=inputs.g,
        rule="delta",
        initial_state=pool[rows],
        output_final_state=True,
        mode="recurrent",
    )
    assert states is not None
    for t in range(3):
        step = slice(t, t + 1)
        assert inputs.beta is not None
        assert inputs.g is not None
        got = linear_attention_step_(
            inputs.q[:, step],
            inputs.k[:, step],
            inputs.v[:, step],
            pool,
            beta=inputs.beta[:, step],
            g=inputs.g[:, step],
            rule="delta",
            state_indices=None if indices is None else torch.tensor(indices),
        )
        assert torch.equal(got, wanted[:, step])
    assert torch.equal(pool[rows], states)
    others = [i for i in range(len(pool)) if i not in rows]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 2)}, r"q has shape \[1, 4, 2\], needed \[B, T, H, K\]"),
        ({"k": torch.zeros(1, 4, 1, 5)}, "k has shape .* must be that of q = 3"),
        ({"v": torch.zeros(1, 5, 2, 2)}, "v has shape .* must be T = 4"),
        ({"q": torch.zeros(1, 4, 3, 3), "k": torch.zeros(1, 4, 3, 3)}, "HV = 2 heads, needed a multiple of q's H = 3"),
        ({"beta": None}, "beta is missing"),
        ({"beta": torch.zeros(1, 4, 1)}, "beta has shape .* must be HV = 2"),
        ({"g": torch.zeros(1, 4, 2, 5)}, "g has shape .* must be K = 3"),
        ({"g": torch.zeros(2, 2)}, "g has shape"),
        ({"g": torch.zeros(1, 4, 2, dtype=torch.int64)}, "g has dtype Long"),
        ({"initial_state": torch.zeros(1, 2, 3, 3)}, "initial_state has shape .* must be V = 2"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "cu_seqlens falls from 3 to 2"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens ends at 9"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens has dtype Float"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Tensor | None], message: str) -> None:
    arguments: dict[str, Tensor | None] = {
        "q": torch.zeros(1, 4, 1, 3),
        "k": torch.zeros(1, 4, 1, 3),
        "v": torch.zeros(1, 4, 2, 2),
        "beta": torch.zeros(1, 4, 2),
    }
    arguments |= change
    with pytest.raises(RuntimeError, match=message):
        linear_attention(**arguments, rule="delta")  # type: ignore[arg-type]


def test_bad_words_and_bad_pools() -> None:
    x, gate = torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match="rule = 'hebb', needed 'additive' or 'delta'"):
        linear_attention(x, x, x, rule="hebb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode = 'fast', needed 'chunk' or 'recurrent'"):
        linear_attention(x, x, x, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="beta is given, but only the delta rule has one"):
        linear_attention(x, x, x, beta=gate)
    with pytest.raises(RuntimeError, match="q has B = 2 with cu_seqlens, needed B = 1"):
        linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 1]))
    pool = torch.zeros(3, 1, 3, 3)
    for indices, message in (([0, 3], r"state_indices\[1\] = 3"), ([1, 1], "names row 1 twice")):
        with pytest.raises(RuntimeError, match=message):
            linear_attention_step_(x, x, x, pool, state_indices=torch.tensor(indices))
    with pytest.raises(RuntimeError, match="P = 3 rows for B = 2 sequences"):
        linear_attention_step_(x, x, x, pool)
    with pytest.raises(RuntimeError, match="state is updated in place and must be contiguous"):
        linear_attention_step_(x, x, x, torch.zeros(2, 1, 3, 3).transpose(2, 3).contiguous().transpose(2, 3))
