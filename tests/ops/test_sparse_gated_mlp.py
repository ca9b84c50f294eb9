# SPDX-License-Identifier: Apache-2.0
"""CATS on the CPU against dense products with a mask in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tilewright import _host
from tilewright.ops import cats_activation, sparse_gated_mlp
from tilewright.ops.sparse_gated_mlp import ACTS, weight_bytes_read
from tilewright.testing import UNIT_ROUNDOFF, assert_within, isa_level


def exponent(x: Tensor) -> Tensor:
    """2 u of GELU's tanh form, whose 1 + tanh u cancels where u is far below 0; 2 / (1 + e^-2u) does not."""
    return 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)


FUNCTIONS = {
    "silu": functional.silu,
    "gelu": lambda x: 0.5 * x * torch.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(exponent(x)),
    "relu": torch.relu,
}


def activation_error(act: str, z: Tensor, a: Tensor) -> Tensor:
    """Of act of an exact argument, as kernels.h promises: 6 units in the last place, 6 |2u| more for the tanh form."""
    return UNIT_ROUNDOFF * (2 * 6 + (2 * 6 * exponent(z).abs() if act == "gelu_tanh" else 0.0)) * a.abs()


Weights = tuple[Tensor, Tensor, Tensor]


def weights_of(inner: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(inner, hidden, generator=generator) / hidden**0.5 for _ in range(3))
    return gate.to(dtype), up.to(dtype), down.to(dtype)


class Oracle:
    """The dense MLP with a mask in float64, and how far float32 arithmetic in the kernel's order may be from it."""

    def __init__(
        self, x: Tensor, weights: Weights, threshold: Any, act: str = "silu", bias: tuple[Tensor, ...] | None = None
    ) -> None:
        gate, up, down = (w.double() for w in weights)
        x = x.double()
        k = x.shape[-1]
        b_gate, b_up, b_down = (b.double() for b in bias) if bias is not None else (torch.zeros(()),) * 3
        z, u = x @ gate.T + b_gate, x @ up.T + b_up
        # A dot product of K in 32 partial sums: K/32 additions, a product, five halvings, and the bias.
        dot = (k / 32 + 8) * UNIT_ROUNDOFF
        z_off = dot * (x.abs() @ gate.abs().T + b_gate.abs())
        u_off = dot * (x.abs() @ up.abs().T + b_up.abs())
        self.a = FUNCTIONS[act](z)
        # No slope of these functions exceeds 1.13.
        self.a_off = 1.13 * z_off + activation_error(act, z, self.a)
        self.threshold = torch.as_tensor(threshold).double()
        self.kept = ~(self.a.abs() < self.threshold)
        a = torch.where(self.kept, self.a, 0.0)
        h = a * u
        h_off = torch.where(self.kept, self.a_off * u.abs() + a.abs() * u_off + 2 * UNIT_ROUNDOFF * h.abs(), 0.0)
        m = gate.shape[0]
        self.y = h @ down + b_down
        self.y_off = h_off @ down.abs() + (m / 32 + 8) * UNIT_ROUNDOFF * (h.abs() @ down.abs() + b_down.abs())

    def check(self, y: Tensor, kept: Tensor, rounding: float = 0.0) -> None:
        """Masks agree wherever float32 can tell, results where the masks do."""
        clear = (self.a.abs() - self.threshold).abs() > self.a_off
        assert torch.equal(kept[clear], self.kept[clear])
        same = (kept == self.kept).all(-1)
        assert bool(same.any()), "no token without a tie: the test says nothing"
        bound = self.y_off + rounding * (self.y.abs() + self.y_off)
        assert_within(y[same], self.y[same], bound[same], "y")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_matches_the_dense_mlp_with_a_mask(level: str, act: Any, bias: bool) -> None:
    torch.manual_seed(3)
    inner, hidden = 133, 71  # no whole vectors anywhere
    weights = weights_of(inner, hidden)
    biases = (torch.randn(inner), torch.randn(inner), torch.randn(hidden)) if bias else None
    for tokens in (1, 3, 6):
        x = torch.randn(tokens, hidden)
        for threshold in (0.0, 0.2, 0.6):
            oracle = Oracle(x, weights, threshold, act, biases)
            y, kept = sparse_gated_mlp(x, *weights, threshold, act, biases, return_kept=True)
            oracle.check(y, kept)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (31, 1), (64, 32), (96, 576), (300, 17)])
def test_every_shape(level: str, shape: tuple[int, int]) -> None:
    inner, hidden = shape
    weights, x = weights_of(inner, hidden), torch.randn(2, hidden)
    oracle = Oracle(x, weights, 0.1)
    oracle.check(*sparse_gated_mlp(x, *weights, 0.1, return_kept=True))


def test_bfloat16(level: str) -> None:
    weights, x = weights_of(200, 96, torch.bfloat16), torch.randn(5, 96).bfloat16()
    oracle = Oracle(x, weights, 0.3)
    y, kept = sparse_gated_mlp(x, *weights, 0.3, return_kept=True)
    assert y.dtype == torch.bfloat16
    oracle.check(y, kept, rounding=2.0**-8)
    # float32 tokens against bfloat16 weights keep float32 results
    wide, _ = sparse_gated_mlp(x.float(), *weights, 0.3, return_kept=True)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), y)


def test_a_threshold_for_each_neuron(level: str) -> None:
    weights, x, threshold = weights_of(90, 40), torch.randn(4, 40), torch.rand(90)
    Oracle(x, weights, threshold).check(*sparse_gated_mlp(x, *weights, threshold, return_kept=True))


def test_levels_threads_and_neighbours_give_the_same_bits(level: str) -> None:
    weights, x = weights_of(517, 200), torch.randn(9, 200)
    with isa_level("generic"):
        torch.set_num_threads(1)
        whole = sparse_gated_mlp(x, *weights, 0.4)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(sparse_gated_mlp(x, *weights, 0.4), whole)
            alone = torch.cat([sparse_gated_mlp(row[None], *weights, 0.4) for row in x])
            assert torch.equal(alone, whole)
    finally:
        torch.set_num_threads(1)


def test_reading_all_rows_gives_the_same_bits() -> None:
    """Nine tokens of a low threshold need nearly every row, one token does not."""
    weights, x = weights_of(256, 64), torch.randn(40, 64)
    y, kept = sparse_gated_mlp(x, *weights, 0.15, return_kept=True)
    together = _host.sparse_gated_mlp_plan(40, 64, 256, int(kept.any(0).sum()))
    alone = _host.sparse_gated_mlp_plan(1, 64, 256, int(kept[0].sum()))
    assert together["dense"]
    assert not alone["dense"]
    assert torch.equal(sparse_gated_mlp(x[:1], *weights, 0.15), y[:1])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_layout_and_threshold(data: st.DataObject) -> None:
    tokens, inner, hidden = (data.draw(st.integers(*limits)) for limits in ((0, 5), (1, 70), (1, 70)))
    weights = weights_of(inner, hidden, seed=data.draw(st.integers(0, 9)))
    x = torch.randn(hidden, tokens).T if data.draw(st.booleans()) else torch.randn(tokens, hidden)
    threshold = data.draw(st.sampled_from([0.0, 0.1, 0.5, 100.0]))
    y, kept = sparse_gated_mlp(x, *weights, threshold, return_kept=True)
    oracle = Oracle(x, weights, threshold)
    assert y.shape == x.shape
    if tokens and bool((kept == oracle.kept).all(-1).any()):
        oracle.check(y, kept)


def test_leading_dimensions_and_no_tokens() -> None:
    weights = weights_of(50, 24)
    x = torch.randn(2, 3, 24)
    y, kept = sparse_gated_mlp(x, *weights, 0.2, return_kept=True)
    assert kept.shape == (2, 3, 50)
    assert torch.equal(y.flatten(0, 1), sparse_gated_mlp(x.flatten(0, 1), *weights, 0.2))
    assert sparse_gated_mlp(x[:, :0], *weights, 0.2).shape == (2, 0, 24)
    assert sparse_gated_mlp(x[0, 0], *weights, 0.2).shape == (24,)


def test_weights_that_are_not_contiguous() -> None:
    gate, up, down = weights_of(50, 24)
    x = torch.randn(3, 24)
    wanted = sparse_gated_mlp(x, gate, up, down, 0.2)
    apart = [torch.cat([w, w], 1)[:, :24] for w in (gate, up, down)]
    assert not apart[0].is_contiguous()
    assert torch.equal(sparse_gated_mlp(x, *apart, 0.2), wanted)


def test_nothing_kept_gives_the_bias() -> None:
    weights, bias = weights_of(40, 16), torch.randn(16)
    x = torch.randn(2, 16)
    assert torch.equal(sparse_gated_mlp(x, *weights, 1e9), torch.zeros(2, 16))
    assert torch.equal(sparse_gated_mlp(x, *weights, 1e9, bias=(None, None, bias)), bias.expand(2, 16))
    assert torch.equal(sparse_gated_mlp(x, *weights, float("inf")), torch.zeros(2, 16))


def test_nan_and_infinity_are_kept_and_stay_with_their_token(level: str) -> None:
    weights = weights_of(40, 16)
    x = torch.randn(4, 16)
    clean, clean_kept = sparse_gated_mlp(x, *weights, 0.3, return_kept=True)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y, kept = sparse_gated_mlp(x, *weights, 0.3, return_kept=True)
    assert bool(y[1].isnan().all())
    assert bool(kept[1].all())
    assert not bool(y[2].isfinite().any())
    for token in (0, 3):
        assert torch.equal(y[token], clean[token])
        assert torch.equal(kept[token], clean_kept[token])


def test_large_values_of_one_sign() -> None:
    inner, hidden = 64, 40
    weights = tuple(torch.full((inner, hidden), 1e4) for _ in range(3))
    x = torch.full((1, hidden), 1e4)
    oracle = Oracle(x, weights, 1.0)  # type: ignore[arg-type]
    oracle.check(*sparse_gated_mlp(x, *weights, 1.0, return_kept=True))


@pytest.mark.parametrize("act", ACTS)
def test_activation(level: str, act: Any) -> None:
    z = torch.cat([torch.linspace(-12, 12, 333), torch.tensor([0.0, -0.0, 1e-30, float("nan"), float("inf")])])
    exact = FUNCTIONS[act](z.double())
    for threshold in (0.0, 0.1, 2.0):
        a = cats_activation(z, threshold, act)
        off = activation_error(act, z.double(), exact) + 1e-37
        clear = ((exact.abs() - threshold).abs() > off) | exact.isnan()
        wanted = torch.where(exact.abs() < threshold, 0.0, exact)
        assert_within(a[clear], wanted[clear], off[clear])
        assert bool(a[-2].isnan())
        assert float(a[-1]) == float("inf")


def test_activation_compares_before_rounding_to_bfloat16() -> None:
    z = torch.randn(4096).bfloat16()
    wide = cats_activation(z.float(), 0.3)
    narrow = cats_activation(z, 0.3)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())


def test_float64_is_the_reference() -> None:
    weights = tuple(w.double() for w in weights_of(30, 20))
    x, bias = torch.randn(3, 20, dtype=torch.float64), (torch.randn(30), torch.randn(30), torch.randn(20))
    biases = tuple(b.double() for b in bias)
    y, kept = sparse_gated_mlp(x, *weights, 0.2, bias=biases, return_kept=True)  # type: ignore[arg-type]
    oracle = Oracle(x, weights, 0.2, bias=biases)  # type: ignore[arg-type]
    assert torch.equal(kept, oracle.kept)
    # 50 roundings of float64 on sums of 30
    assert_within(y, oracle.y, 50 * 2.0**-53 * (oracle.y_off / UNIT_ROUNDOFF + oracle.y.abs()))


def away_from(x: Tensor, weights: Weights, threshold: float, act: str) -> bool:
    a = FUNCTIONS[act](x @ weights[0].T).abs()
    return bool(((a - threshold).abs() > 1e-3).all())


@pytest.mark.parametrize("act", ACTS)
def test_gradients(act: Any) -> None:
    for seed in range(20):
        weights = tuple(w.double().requires_grad_() for w in weights_of(7, 5, seed=seed))
        x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        if away_from(x, weights, 0.2, act):  # type: ignore[arg-type]
            break
    biases = tuple(torch.randn(n, dtype=torch.float64).mul(0.001).requires_grad_() for n in (7, 7, 5))
    kept = sparse_gated_mlp(x, *weights, 0.2, act, biases, return_kept=True)[1]  # type: ignore[arg-type]
    assert 0 < int(kept.sum()) < kept.numel()

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *bias: Tensor) -> Tensor:
        return sparse_gated_mlp(x, gate, up, down, 0.2, act, bias)  # type: ignore[arg-type, return-value]

    assert torch.autograd.gradcheck(mlp, (x, *weights, *biases), eps=1e-6)
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cats_activation(z, 0.05, act), z, eps=1e-7)


def test_dropped_neurons_pass_no_gradient() -> None:
    z = torch.tensor([-0.5, 0.01, 0.3, 3.0], requires_grad=True)
    cats_activation(z, 0.1).sum().backward()
    kept = functional.silu(z).abs() >= 0.1
    assert z.grad is not None
    assert torch.equal(z.grad != 0, kept)


def test_operator_checks() -> None:
    gate, up, down = weights_of(24, 8)
    x, threshold = torch.randn(3, 8), torch.tensor(0.2)
    biases = (torch.randn(24), torch.randn(24), torch.randn(8))
    for tensors in ((x, gate, up, down), tuple(t.clone().requires_grad_() for t in (x, gate, up, down))):
        torch.library.opcheck(torch.ops.tilewright.sparse_gated_mlp, (*tensors, threshold, "silu", *biases))
        torch.library.opcheck(torch.ops.tilewright.cats_activation, (tensors[0], threshold, "gelu"))


def test_compiles_as_one_graph() -> None:
    weights, x = weights_of(24, 8), torch.randn(3, 8)
    compiled = torch.compile(lambda x: sparse_gated_mlp(x, *weights, 0.2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sparse_gated_mlp(x, *weights, 0.2))


def test_bytes_that_are_read() -> None:
    hidden, inner = 64, 100
    kept = torch.zeros(2, inner, dtype=torch.bool)
    kept[0, :10], kept[1, 5:15] = True, True
    assert weight_bytes_read(kept, hidden) == 4 * hidden * (inner + 2 * 15)
    assert weight_bytes_read(kept, hidden, torch.bfloat16) == 2 * hidden * (inner + 2 * 15)
    assert weight_bytes_read(torch.ones(1, inner, dtype=torch.bool), hidden) == 4 * hidden * 3 * inner
    plan = _host.sparse_gated_mlp_plan(1, hidden, inner, 86)
    assert plan["dense"]
    assert plan["rows"] == inner
    assert "dense" in plan["text"]


@pytest.fixture
def arguments() -> dict[str, Any]:
    gate, up, down = weights_of(24, 8)
    return {"x": torch.randn(2, 8), "w_gate": gate, "w_up": up, "w_down_t": down, "threshold": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 9)}, "D"),
        ({"w_up": torch.randn(23, 8)}, "w_up"),
        ({"w_down_t": torch.randn(8, 24)}, "w_down_t"),
        ({"w_up": torch.randn(24, 8).bfloat16()}, "w_up has dtype"),
        ({"threshold": -0.1}, "threshold holds"),
        ({"threshold": float("nan")}, "threshold holds"),
        ({"threshold": torch.zeros(7)}, "threshold has shape"),
        ({"act": "tanh"}, "act = 'tanh'"),
        ({"bias": (torch.zeros(3), None, None)}, "b_gate"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        sparse_gated_mlp(**(arguments | change))


def test_half_weights_are_refused_with_the_way_out(arguments: dict[str, Any]) -> None:
    half = {name: value.half() for name, value in arguments.items() if name.startswith("w_")}
    with pytest.raises(RuntimeError, match=r"convert the weights with \.to"):
        sparse_gated_mlp(**(arguments | half))
