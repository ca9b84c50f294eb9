# SPDX-License-Identifier: Apache-2.0
"""Local linear attention and Parallax against the dense solve of every query's regression."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import _host
from tilewright.ops import lla_attention, lla_decode, parallax, relmm
from tilewright.reference.local_linear_attention import lla_reference, parallax_reference, visible_keys
from tilewright.testing import isa_level, isa_levels

BLOCK, TILE = 48, 64  # queries of a block at one head a group; keys of a tile
TIGHT = {"cg_rtol": 1e-13, "cg_max_iters": 400}


def inputs(
    tokens: int,
    key_size: int,
    value_size: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and lambda in [0.3, 1.3), all asking for gradients."""
    keys = tokens if keys is None else keys
    q = torch.randn(batch, tokens, heads, key_size, dtype=dtype)
    k = torch.randn(batch, keys, kv_heads, key_size, dtype=dtype)
    v = torch.randn(batch, keys, kv_heads, value_size, dtype=dtype)
    ridge = 0.3 + torch.rand(batch, tokens, heads, dtype=dtype)
    return tuple(x.requires_grad_() for x in (q, k, v, ridge))  # type: ignore[return-value]


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; the absolute norm where want is nothing but rounding of zero."""
    got, want = got.detach().double(), want.detach().double()
    difference, size = float((got - want).norm()), float(want.norm())
    return difference / size if size > 1e-12 else difference


def check(tensors: tuple[Tensor, ...], solver: str, reference: dict | None = None, **options: object) -> None:
    """Values within 1e-9 and all gradients within 1e-8 of the oracle, float64."""
    q, k, v, ridge = tensors
    settings_ = {**TIGHT, "solver": solver, **options}
    o = lla_attention(q, k, v, ridge_lambda=ridge, **settings_)
    want, _ = lla_reference(q, k, v, ridge_lambda=ridge, **options)
    assert o.shape == want.shape
    assert relative(o, want) <= 1e-9
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, tensors, weight)
    exact = torch.autograd.grad(want, tensors, weight)
    for name, a, b in zip(("q", "k", "v", "lambda"), found, exact, strict=True):
        assert relative(a, b) <= 1e-8, name


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("tokens", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, TILE - 1, TILE, TILE + 1, 200])
def test_values_and_gradients_at_every_kind_of_length(tokens: int, solver: str) -> None:
    check(inputs(tokens, 7, 5), solver)


def test_a_thousand_tokens() -> None:
    check(inputs(1000, 4, 3), "direct")


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize(("key_size", "value_size"), [(1, 16), (16, 1), (60, 100), (64, 60), (100, 64), (128, 128)])
def test_values_and_gradients_at_every_kind_of_size(key_size: int, value_size: int, solver: str) -> None:
    check(inputs(70 if key_size < 100 else 20, key_size, value_size), solver)


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1), (50, 1)])
def test_grouped_heads_and_batches(heads: int, kv_heads: int, solver: str) -> None:
    check(inputs(70 if heads < 50 else 9, 5, 6, batch=2, heads=heads, kv_heads=kv_heads), solver)


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize(
    "options",
    [
        {"ridge": "absolute"},
        {"ridge_grad": False},
        {"ridge": "absolute", "ridge_grad": False},
        {"scale": 0.7},
        {"scale": -0.1},
        {"window_size": 1},
        {"window_size": 50},
        {"causal": False},
        {"causal": False, "window_size": 30},
    ],
    ids=str,
)
def test_options(options: dict, solver: str) -> None:
    check(inputs(110, 6, 4, heads=2), solver, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 90), (50, 117), (64, 65)])
def test_more_keys_than_queries(tokens: int, keys: int, causal: bool) -> None:
    check(inputs(tokens, 6, 4, keys=keys), "cg", causal=causal)


def test_fewer_keys_than_queries() -> None:
    check(inputs(70, 6, 4, keys=9), "cg", causal=False)
    q, k, v, _ = inputs(5, 6, 4, keys=0)
    for solver, ridge in itertools.product(("cg", "direct"), ("relative", "absolute")):
        o, stats = lla_attention(q, k, v, causal=False, return_stats=True, solver=solver, ridge=ridge)
        assert torch.equal(o, torch.zeros(1, 5, 1, 4, dtype=torch.float64))
        assert all(bool((value == 0).all()) for value in stats.values())
        assert torch.equal(torch.autograd.grad(o.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
def test_the_preconditioner_changes_the_way_not_the_end(preconditioner: str | None) -> None:
    q, k, v, ridge = inputs(90, 12, 4, heads=2)
    o = lla_attention(q, k * torch.logspace(-1, 1, 12), v, ridge_lambda=ridge, preconditioner=preconditioner,
                      solver="cg", **TIGHT)  # fmt: skip
    want, _ = lla_reference(q, k * torch.logspace(-1, 1, 12), v, ridge_lambda=ridge)
    assert relative(o, want) <= 1e-9


def float32_bound(tensors: tuple[Tensor, ...], want: Tensor, rtol: float) -> Tensor:
    """Per row [B, T, HQ], for heads without groups: what stopping and what rounding may cost.

    With |residual| <= rtol |zbar|, x is off by A^-1 residual, A = Cov + lambda I, and o by
    sum_j p_j (k_j - kbar).dx v_j, of which each element is at most its standard deviation under p times
    |Cov^1/2 A^-1 residual|; the largest eigenvalue of Cov^1/2 A^-1 is at most 1 / (2 sqrt(lambda)). Rounding may cost
    twice what it costs the worst row of the dense solve in float32.
    """
    q, k, v, ridge = (x.detach().double() for x in tensors)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~visible_keys(q.shape[1], k.shape[1], True, None), -torch.inf).softmax(-1)
    zbar = torch.einsum("bhts,bshk->bthk", p, k) - q
    mean = torch.einsum("bhts,bshv->bthv", p, v)
    variance = torch.einsum("bhts,bshv->bthv", p, v.square()) - mean.square()
    stopping = rtol * zbar.norm(dim=-1) * variance.clamp_min(0).sum(-1).sqrt() / (2 * ridge.sqrt())
    narrow, _ = lla_reference(*(x.detach().float() for x in tensors[:3]), ridge_lambda=tensors[3].detach().float())
    rounding = (narrow.double() - want).norm(dim=-1)
    return stopping + 2 * rounding.max()


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("key_size", [5, 16, 64])
def test_float32_at_every_level(level: str, key_size: int, solver: str) -> None:
    tensors = inputs(130, key_size, 24, heads=2, kv_heads=2, dtype=torch.float32)
    want, stats = lla_reference(*(x.double() for x in tensors[:3]), ridge_lambda=tensors[3].double())
    rtol = 1e-4
    o, found = lla_attention(*tensors[:3], ridge_lambda=tensors[3], solver=solver, cg_rtol=rtol, cg_max_iters=200,
                             return_stats=True)  # fmt: skip
    assert (found["residual"] <= (rtol if solver == "cg" else 1e-5)).all()
    assert (found["iters"] > 0).any() if solver == "cg" else (found["iters"] == 0).all()
    error = (o.double() - want).norm(dim=-1)
    assert (error <= float32_bound(tensors, want.detach(), rtol if solver == "cg" else 0.0)).all()
    assert relative(found["omega"], stats["omega"]) <= 1e-5
    assert relative(found["delta"], stats["delta"]) <= 1e-3


@pytest.mark.parametrize("key_size", [5, 16, 64])
def test_float32_gradients_at_every_level(level: str, key_size: int) -> None:
    """At most twice the error of the dense solve and its autograd in float32.

    Conjugate gradients to 1e-6 may add that times the condition number, below 10 for these keys and ridges.
    """
    tensors = inputs(130, key_size, 24, heads=2, kv_heads=2, dtype=torch.float32)
    weight = torch.randn(1, 130, 2, 24)

    def gradients(wide: bool, run: Callable[..., Tensor]) -> list[Tensor]:
        dtype = torch.float64 if wide else torch.float32
        copies = [x.detach().to(dtype).requires_grad_() for x in tensors]
        return list(torch.autograd.grad(run(*copies), copies, weight.to(dtype)))

    exact = gradients(True, lambda q, k, v, ridge: lla_reference(q, k, v, ridge_lambda=ridge)[0])
    dense = gradients(False, lambda q, k, v, ridge: lla_reference(q, k, v, ridge_lambda=ridge)[0])
    direct = gradients(False, lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, solver="direct"))
    iterated = gradients(
        False,
        lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, solver="cg", cg_rtol=1e-6, cg_max_iters=200),
    )
    for name, want, theirs, ours, by_cg in zip(("q", "k", "v", "lambda"), exact, dense, direct, iterated, strict=True):
        assert relative(ours, want) <= 2 * relative(theirs, want), name
        assert relative(by_cg, want) <= 2 * relative(theirs, want) + 1e-5, name


def test_default_settings_reach_a_thousandth_in_float32() -> None:
    for ridge in (0.1, 1.0, 10.0):
        q, k, v, _ = inputs(256, 64, 64, dtype=torch.float32)
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        want, _ = lla_reference(q.double(), k.double(), v.double(), ridge_lambda=ridge)
        assert relative(lla_attention(q, k, v, ridge_lambda=ridge), want) <= 1e-3
        assert relative(lla_attention(q, k, v, ridge_lambda=ridge, solver="direct"), want) <= 1e-5


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_keys_of_one_sign_far_from_the_origin(level: str, solver: str) -> None:
    """An offset common to keys and queries does not change the fit, and must not cost float32 its accuracy.

    The exact fit is that of the rounded inputs, so that only the kernel's own rounding counts: of differences of size
    about 1, as without offset, and of scores of size |q| |k| scale = 4 * 101^2 * 0.01, whose error is their relative
    error in a weight.
    """
    q, k, v, ridge = (x.detach() for x in inputs(100, 4, 4, dtype=torch.float32))
    q, k = q.abs() + 100, k.abs() + 100
    want, _ = lla_reference(q.double(), k.double(), v.double(), ridge_lambda=ridge.double(), scale=0.01)
    o = lla_attention(q, k, v, ridge_lambda=ridge, scale=0.01, solver=solver, cg_rtol=1e-6, cg_max_iters=100)
    assert relative(o, want) <= 2 * 4 * 101**2 * 0.01 * 2.0**-24


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_same_sign_extremes(level: str, sign: float, solver: str) -> None:
    """All products of a score have one sign and the largest size: the softmax picks one key."""
    k = torch.ones(1, 70, 1, 8) * torch.linspace(1, 50, 70)[None, :, None, None]
    q = torch.full((1, 70, 1, 8), 50.0 * sign)
    v = torch.randn(1, 70, 1, 3)
    o = lla_attention(q, k, v, solver=solver)
    want, _ = lla_reference(q.double(), k.double(), v.double())
    assert relative(o, want) <= 1e-3


def test_levels_agree_and_the_generic_one_is_among_them() -> None:
    q, k, v, _ = inputs(130, 20, 20, heads=2, dtype=torch.float64)
    results = []
    for name in isa_levels():
        with isa_level(name):
            o = lla_attention(q, k, v, solver="cg", **TIGHT)
            results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    for result, name in zip(results, isa_levels(), strict=True):
        for got, first in zip(result, results[0], strict=True):
            assert relative(got, first) <= 1e-10, name


def test_the_same_bits_at_any_number_of_threads() -> None:
    tensors = inputs(150, 40, 20, heads=4, kv_heads=2, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            o = lla_attention(*tensors[:3], ridge_lambda=tensors[3])
            results.append((o, *torch.autograd.grad(o.square().sum(), tensors)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 130)), min_size=1, max_size=4),
    behind=st.integers(0, 3),
    solver=st.sampled_from(["cg", "direct"]),
    window=st.sampled_from([None, 20]),
)
def test_packing_changes_no_bit(counts: list[int], behind: int, solver: str, window: int | None) -> None:
    total = sum(counts)
    q, k, v, ridge = inputs(total + behind, 9, 8, heads=4, kv_heads=2, dtype=torch.float32)
    weight = torch.randn(1, total + behind, 4, 8)
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    options = {"solver": solver, "window_size": window}
    packed = lla_attention(q, k, v, ridge_lambda=ridge, cu_seqlens=offsets, **options)
    grads = torch.autograd.grad(packed, (q, k, v, ridge), weight)
    assert (packed[:, total:] == 0).all()
    for first, last in itertools.pairwise(offsets.tolist()):
        rows = slice(first, last)
        parts = [x[:, rows].detach().requires_grad_() for x in (q, k, v, ridge)]
        alone = lla_attention(*parts[:3], ridge_lambda=parts[3], **options)
        assert torch.equal(packed[:, rows], alone)
        for whole, part in zip(grads, torch.autograd.grad(alone, parts, weight[:, rows]), strict=True):
            assert torch.equal(whole[:, rows], part)
    for whole in grads:
        assert (whole[:, total:] == 0).all()


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("where", ["q", "k", "v", "lambda"])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(level: str, where: str, solver: str) -> None:
    """Also within a block of queries and a tile of keys, forward and backward."""
    bad, tokens = 60, 130
    q, k, v, ridge = inputs(tokens, 6, 5, heads=2, kv_heads=1, dtype=torch.float32)
    clean = lla_attention(q, k, v, ridge_lambda=ridge, solver=solver)
    with torch.no_grad():
        {"q": q, "k": k, "v": v, "lambda": ridge}[where][0, bad] = torch.nan
    o = lla_attention(q, k, v, ridge_lambda=ridge, solver=solver)
    sees = torch.zeros(tokens, dtype=torch.bool)
    sees[bad : None if where in "kv" else bad + 1] = True
    assert o[0, sees].isnan().all()
    assert torch.equal(o[0, ~sees], clean[0, ~sees])
    # The loss reads only rows before the bad one; the gradient of the others is zero.
    grads = torch.autograd.grad(o[:, :bad].sum(), (q, k, v, ridge))
    alone = [x[:, :bad].detach().requires_grad_() for x in (q, k, v, ridge)]
    want = torch.autograd.grad(lla_attention(*alone[:3], ridge_lambda=alone[3], solver=solver).sum(), alone)
    for name, got, exact in zip(("q", "k", "v", "lambda"), grads, want, strict=True):
        if name in ("q", "lambda"):
            assert relative(got[:, :bad], exact) <= 1e-5
    # Keys behind everything that a bad row sees keep their gradient: here those behind the bad query.
    if where in ("q", "lambda"):
        late = torch.autograd.grad(
            lla_attention(q, k, v, ridge_lambda=ridge, solver=solver)[:, bad + 1 :].sum(), (k, v)
        )
        assert all(bool(g[:, bad + 1 :].isfinite().all()) for g in late)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_converted_at_the_edge(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.detach().to(dtype).requires_grad_() for x in inputs(70, 16, 8, dtype=torch.float32))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    o, want = lla_attention(q, k, v), lla_attention(*wide)
    assert o.dtype == dtype
    assert torch.equal(o, want.to(dtype))
    weight = torch.randn_like(o)
    for got, exact in zip(
        torch.autograd.grad(o, (q, k, v), weight), torch.autograd.grad(want, wide, weight.float()), strict=True
    ):
        assert torch.equal(got, exact.to(dtype))


def test_any_layout_and_one_head_without_its_dimension() -> None:
    q, k, v, _ = inputs(40, 8, 6, heads=2, kv_heads=2, dtype=torch.float32)
    strange = [x.detach().permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (q, k, v)]
    assert torch.equal(lla_attention(*strange), lla_attention(q, k, v))
    single = lla_attention(*(x[:, :, 0] for x in (q, k, v)))
    assert torch.equal(single, lla_attention(*(x[:, :, :1] for x in (q, k, v)))[:, :, 0])


@pytest.mark.parametrize("shape", [(), (2,), (30, 1), (30, 2), (3, 30, 2)])
def test_lambda_broadcasts_and_so_does_its_gradient(shape: tuple[int, ...]) -> None:
    q, k, v, _ = inputs(30, 5, 4, batch=3, heads=2)
    ridge = (0.5 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=ridge, solver="direct")
    want, _ = lla_reference(q, k, v, ridge_lambda=ridge)
    assert relative(o, want) <= 1e-9
    got, exact = (torch.autograd.grad(x.square().sum(), ridge)[0] for x in (o, want))
    assert got.shape == ridge.shape
    assert relative(got, exact) <= 1e-8


def test_against_weighted_least_squares_of_numpy() -> None:
    """The intercept of rows sqrt(w) (1, z) with ridge rows, by numpy's least squares: no normal equations at all."""
    tokens, size, ridge = 40, 6, 0.2
    q, k, v, _ = (x.detach() for x in inputs(tokens, size, 3))
    o = lla_attention(q, k, v, ridge_lambda=ridge, solver="cg", **TIGHT)[0, :, 0].numpy()
    q, k, v = (x[0, :, 0].numpy() for x in (q, k, v))
    for i in range(tokens):
        weights = np.exp(k[: i + 1] @ q[i] * size**-0.5)
        rows = np.sqrt(weights)[:, None] * np.hstack([np.ones((i + 1, 1)), k[: i + 1] - q[i]])
        ridges = np.sqrt(ridge * weights.sum()) * np.hstack([np.zeros((size, 1)), np.eye(size)])
        targets = np.vstack([np.sqrt(weights)[:, None] * v[: i + 1], np.zeros((size, 3))])
        fit = np.linalg.lstsq(np.vstack([rows, ridges]), targets, rcond=None)[0]
        assert np.abs(fit[0] - o[i]).max() <= 1e-8


def test_the_oracle_in_cpp_agrees() -> None:
    for options in ({}, {"window_size": 9}, {"causal": False}, {"ridge": "absolute"}):
        q, k, v, ridge = inputs(40, 6, 5, heads=4, kv_heads=2)
        want, _ = lla_reference(q, k, v, ridge_lambda=ridge, **options)
        got = torch.ops.tilewright.lla_reference(
            q, k, v, ridge, None, 6**-0.5, options.get("causal", True), options.get("window_size"), "ridge" in options
        )
        assert relative(got, want) <= 1e-12


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_large_ridge_is_softmax_attention(level: str, solver: str) -> None:
    q, k, v, _ = inputs(100, 16, 8, heads=2, kv_heads=2, dtype=torch.float32)
    o = lla_attention(q, k, v, ridge_lambda=1e8, solver=solver)
    heads = [x.transpose(1, 2).double() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert relative(o, want) <= 1e-6


def test_values_affine_in_keys_are_recovered() -> None:
    q, k, _, _ = (x.detach() for x in inputs(200, 8, 1, dtype=torch.float32))
    slope, offset = torch.randn(8, 5), torch.randn(5)
    v, truth = k @ slope + offset, q @ slope + offset
    o = lla_attention(q, k, v, ridge_lambda=1e-7, solver="direct")
    softmax = lla_attention(q, k, v, ridge_lambda=1e8)
    late = slice(100, None)
    assert relative(o[:, late], truth[:, late]) <= 1e-5
    assert relative(softmax[:, late], truth[:, late]) > 0.1


def test_without_ridge_where_every_query_sees_enough() -> None:
    q, k, v, _ = inputs(20, 5, 4, keys=60)
    zero = torch.zeros(1, 20, 1, dtype=torch.float64)
    o = lla_attention(q, k, v, ridge_lambda=zero, solver="direct")
    want, _ = lla_reference(q, k, v, ridge_lambda=zero)
    assert relative(o, want) <= 1e-9


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_rows_without_a_choice(level: str, solver: str) -> None:
    """One visible key gives its value; equal keys give the mean; weights of a row sum to 1."""
    q, k, v, _ = (x.detach() for x in inputs(60, 8, 4, dtype=torch.float32))
    assert torch.equal(lla_attention(q, k, v, solver=solver)[0, 0], v[0, 0])
    equal = lla_attention(q, k[:, :1].expand(-1, 60, -1, -1), v, solver=solver)
    means = v.double().cumsum(1) / torch.arange(1, 61)[None, :, None, None]
    assert relative(equal, means) <= 1e-5
    ones = lla_attention(q, k, torch.ones_like(v), ridge_lambda=0.01, solver=solver)
    assert (ones - 1).abs().max() <= 1e-6


def test_the_published_gradient_is_another_one() -> None:
    q, k, v, _ = inputs(60, 6, 4)
    weight = torch.randn(1, 60, 1, 4, dtype=torch.float64)
    grads = [
        torch.autograd.grad(lla_attention(q, k, v, ridge_lambda=1.0, ridge_grad=full, **TIGHT), (q, k), weight)
        for full in (True, False)
    ]
    assert min(relative(b, a) for a, b in zip(*grads, strict=True)) > 0.01


def test_iterations_stop_at_the_tolerance_or_the_limit() -> None:
    q, k, v, _ = (x.detach() for x in inputs(150, 40, 8, dtype=torch.float32))
    loose, tight = (
        lla_attention(q, k, v, ridge_lambda=0.1, solver="cg", cg_rtol=rtol, cg_max_iters=100, return_stats=True)[1]
        for rtol in (1e-2, 1e-4)
    )
    assert (loose["residual"] <= 1e-2).all()
    assert (tight["residual"] <= 1e-4).all()
    assert (loose["iters"] <= tight["iters"]).all()
    assert loose["iters"].sum() < tight["iters"].sum()
    _, capped = lla_attention(q, k, v, ridge_lambda=0.1, solver="cg", cg_rtol=0, cg_max_iters=3, return_stats=True)
    assert capped["iters"].max() == 3
    assert capped["residual"].max() > 1e-4


def test_gradcheck() -> None:
    q, k, v, ridge = inputs(7, 3, 2, heads=2)
    for solver in ("cg", "direct"):
        torch.autograd.gradcheck(
            lambda *x, solver=solver: lla_attention(*x[:3], ridge_lambda=x[3], solver=solver, **TIGHT), (q, k, v, ridge)
        )
    r = torch.randn_like(q, requires_grad=True)
    torch.autograd.gradcheck(parallax, (q, r, k, v))


@pytest.mark.parametrize("start", ["cold", "warm", "nonsense"])
@pytest.mark.parametrize("key_size", [8, 48])
def test_decoding_continues_the_sequence(level: str, start: str, key_size: int) -> None:
    batch, room, lengths = 2, 90, torch.tensor([70, 33])
    q, k, v, ridge = (
        x.detach() for x in inputs(room, key_size, 6, batch=batch, heads=4, kv_heads=2, dtype=torch.float64)
    )
    rho = {"cold": None, "warm": None, "nonsense": torch.randn(batch, 1, 4, key_size, dtype=torch.float64)}[start]
    for step in range(3):
        cache_lens = lengths + step
        now = torch.stack([q[b, n - 1 : n] for b, n in enumerate(cache_lens)])
        strength = torch.stack([ridge[b, n - 1 : n] for b, n in enumerate(cache_lens)])
        cache_k, cache_v = k.clone(), v.clone()
        for b, n in enumerate(cache_lens):
            cache_k[b, n:], cache_v[b, n:] = torch.nan, torch.nan
        o, found = lla_decode(now, cache_k, cache_v, cache_lens, ridge_lambda=strength, rho_init=rho, **TIGHT)
        want, stats = lla_reference(q, k, v, ridge_lambda=ridge)
        for b, n in enumerate(cache_lens):
            assert relative(o[b, 0], want[b, n - 1]) <= 1e-9
            assert relative(found[b, 0], stats["rho"][b, n - 1]) <= 1e-9
        rho = found if start == "warm" else rho


def test_decoding_several_tokens_at_once() -> None:
    q, k, v, _ = (x.detach() for x in inputs(100, 40, 6, heads=2, kv_heads=2, dtype=torch.float32))
    whole = lla_attention(q, k, v)
    o, stats = lla_decode(q[:, 95:], k, v, torch.tensor([100]), return_stats=True)
    # The keys' centre is another one: the tolerance of the solver and rounding are what may differ.
    assert relative(o, whole[:, 95:]) <= 1e-3
    assert set(stats) == {"omega", "rho", "delta", "iters", "residual"}


def test_a_warm_start_saves_iterations_where_queries_change_slowly() -> None:
    tokens, size = 200, 48
    torch.manual_seed(1)
    k, v = torch.randn(1, tokens, 1, size), torch.randn(1, tokens, 1, size)
    q = torch.randn(1, 1, 1, size) + 1e-3 * torch.randn(1, tokens, 1, size)
    _, stats = lla_attention(q, k, v, ridge_lambda=0.1, return_stats=True)
    arguments = (q[:, -1:], k, v, torch.tensor([tokens]))
    _, cold = lla_decode(*arguments, ridge_lambda=0.1, return_stats=True)
    _, warm = lla_decode(*arguments, ridge_lambda=0.1, rho_init=stats["rho"][:, -2:-1], return_stats=True)
    assert warm["iters"].item() < cold["iters"].item()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_parallax_values_and_gradients(level: str, causal: bool, window: int | None) -> None:
    q, k, v, _ = inputs(110, 7, 5, heads=4, kv_heads=2)
    r = torch.randn_like(q, requires_grad=True)
    o = parallax(q, r, k, v, causal=causal, window_size=window)
    want = parallax_reference(q, r, k, v, causal=causal, window_size=window)
    assert relative(o, want) <= 1e-12
    weight = torch.randn_like(o)
    for got, exact in zip(
        torch.autograd.grad(o, (q, r, k, v), weight), torch.autograd.grad(want, (q, r, k, v), weight), strict=True
    ):
        assert relative(got, exact) <= 1e-12


def test_parallax_with_the_solution_is_local_linear_attention() -> None:
    q, k, v, _ = (x.detach() for x in inputs(90, 6, 5))
    o, stats = lla_attention(q, k, v, solver="direct", return_stats=True)
    # rho / delta * omega is the solution of the problem with the intercept eliminated.
    r = stats["rho"] * (stats["omega"] / stats["delta"])[..., None]
    assert relative(parallax(q, r, k, v), o) <= 1e-12
    cu = torch.tensor([0, 30, 30, 80])
    packed = parallax(q, r, k, v, cu_seqlens=cu)
    assert torch.equal(packed[:, 30:80], parallax(*(x[:, 30:80] for x in (q, r, k, v))))
    assert (packed[:, 80:] == 0).all()


def test_relmm_is_the_products_with_differences() -> None:
    x, q, k = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    want = torch.einsum("btd,btsd->bts", x, k[:, None] - q[:, :, None])
    assert relative(relmm(x, q, k), want) <= 1e-6


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_compiles_as_one_graph(solver: str) -> None:
    tensors = inputs(20, 6, 4, heads=2, dtype=torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
        return lla_attention(q, k, v, ridge_lambda=ridge, solver=solver).square().sum() + parallax(q, q, k, v).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors), strict=True
    ):
        assert relative(got, want) <= 1e-6


def test_opcheck() -> None:
    library = torch.ops.tilewright
    q, k, v, ridge = inputs(9, 4, 3, heads=2, dtype=torch.float32)
    options = (0.5, True, None, 1e-4, 32)
    for solver in ("cg", "direct"):
        arguments = (q, k, v, ridge, None, None, None, *options, solver, False, False, True)
        torch.library.opcheck(library.lla_forward.default, arguments)
    plain = tuple(x.detach() for x in (q, k, v, ridge))
    torch.library.opcheck(
        library.lla_backward.default,
        (torch.randn(1, 9, 2, 3), *plain, plain[0], None, *options, "cg", False, False, True),
    )
    torch.library.opcheck(library.parallax_forward.default, (q, q.detach(), k, v, None, 0.5, True, 4))
    torch.library.opcheck(
        library.parallax_backward.default,
        (torch.randn(1, 9, 2, 3), plain[0], plain[0], *plain[1:3], None, 0.5, True, None),
    )


def test_wrong_arguments_are_errors() -> None:
    q, k, v = torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 6), torch.randn(2, 8, 2, 5)
    cases = [
        ("HQ = 3", (q[:, :, :3], k, v), {}),
        ("must be K = 6", (q, k[..., :5], v), {}),
        ("must be S = 8", (q, k, v[:, :7]), {}),
        ("must be B = 2", (q, k[:1], v), {}),
        ("k has dtype Double", (q, k.double(), v), {}),
        ("q has dtype Long", (q.long(), k, v), {}),
        ("needed \\[B, T, HQ, K\\]", (q[0, 0], k, v), {}),
        ("8 queries and 5 keys", (q, k[:, :5], v[:, :5]), {}),
        ("with cu_seqlens needed B = 1", (q, k, v), {"cu_seqlens": torch.tensor([0, 8])}),
        ("cu_seqlens falls from 5 to 3", (q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 5, 3])}),
        ("cu_seqlens ends at 9", (q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 9])}),
        ("cu_seqlens has dtype Float", (q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0.0, 8.0])}),
        ("negative entry", (q, k, v), {"ridge_lambda": -1.0}),
        ("entry 0, which conjugate gradients", (q, k, v), {"ridge_lambda": 0.0, "solver": "cg"}),
        ("sees 1 keys, needed more than K = 6", (q, k, v), {"ridge_lambda": 0.0, "solver": "direct"}),
        ("does not broadcast", (q, k, v), {"ridge_lambda": torch.ones(7)}),
        ("window_size = 0", (q, k, v), {"window_size": 0}),
        ("cg_max_iters = 0", (q, k, v), {"cg_max_iters": 0}),
        ("cg_rtol = -1", (q, k, v), {"cg_rtol": -1.0}),
    ]
    for message, tensors, options in cases:
        with pytest.raises(RuntimeError, match=message):
            lla_attention(*tensors, **options)
    for options in ({"solver": "lu"}, {"ridge": "none"}, {"preconditioner": "ilu"}):
        with pytest.raises(ValueError, match="needed one of"):
            lla_attention(q, k, v, **options)
    with pytest.raises(RuntimeError, match="length of 9"):
        lla_decode(q[:, :1], k, v, torch.tensor([8, 9]))
    with pytest.raises(RuntimeError, match="1 queries and 0 keys"):
        lla_decode(q[:, :1], k, v, torch.tensor([8, 0]))
    with pytest.raises(RuntimeError, match="rho_init has shape"):
        lla_decode(q[:, :1], k, v, torch.tensor([8, 8]), rho_init=torch.randn(2, 1, 4, 5))
    with pytest.raises(RuntimeError, match="r has shape"):
        parallax(q, q[..., :3], k, v)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7, 60]),
)
def test_the_plan_covers_every_query_and_key_once(counts: list[tuple[int, int]], kv_heads: int, group: int) -> None:
    queries, keys = ([pair[i] for pair in counts] for i in (0, 1))
    plan = _host.local_linear_attention_plan(queries, keys, kv_heads * group, kv_heads)
    for items, sizes in ((plan["blocks"], queries), (plan["key_items"], keys)):
        covered = sorted((origin + first + i, head) for origin, head, first, size in items for i in range(size))
        assert covered == [(row, head) for row in range(sum(sizes)) for head in range(kv_heads)]
    assert all(0 < size <= max(BLOCK // group, 1) for *_, size in plan["blocks"])
    assert all(first % TILE == 0 and 0 < size <= TILE for *_, first, size in plan["key_items"])
    assert f"{len(plan['blocks'])} blocks" in plan["text"]
