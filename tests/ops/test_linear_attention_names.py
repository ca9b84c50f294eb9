# SPDX-License-Identifier: Apache-2.0
"""The public names of the family: what each adds to linear_attention, and the signatures users know."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops
from tilewright.ops.delta_rule import gate_logarithm, l2_normalize
from tilewright.ops.gated_linear_attention import retention_decay
from tilewright.reference.linear_attention import recurrence

B, T, H, HV, K, V = 2, 37, 2, 4, 6, 5
# float64 against float64: a few hundred roundings.
EXACT = 1e-12


@pytest.fixture
def x() -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, HV, V),
        "b": normal(B, T, HV),
        "a": normal(B, T, HV),
        "channel": normal(B, T, HV, K),
        "A_log": normal(HV),
        "state": normal(B, HV, K, V),
    }


def _close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=EXACT, atol=EXACT * float(wanted.abs().amax()))


def test_delta_rule_normalises_q_and_k(x: dict[str, Tensor]) -> None:
    beta = x["b"].sigmoid()
    unit = {n: x[n] / (x[n].square().sum(-1, keepdim=True) + 1e-6).sqrt() for n in ("q", "k")}
    wanted, state = recurrence(unit["q"], unit["k"], x["v"], beta=beta, rule="delta", initial_state=x["state"])
    for function in (ops.chunk_delta_rule, ops.fused_recurrent_delta_rule):
        o, final = function(x["q"], x["k"], x["v"], beta, None, x["state"], True, True)
        assert final is not None
        assert _close(o, wanted)
        assert _close(final, state)
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    l2_normalize(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_gated_delta_rule_computes_its_gates(x: dict[str, Tensor]) -> None:
    dt_bias = torch.randn(HV, dtype=torch.float64)
    g = -x["A_log"].exp() * F.softplus(x["a"] + dt_bias)
    beta = 2 * x["b"].sigmoid()
    wanted, state = recurrence(
        x["q"], x["k"] / 9, x["v"], beta=beta, g=g, rule="delta", initial_state=x["state"], scale=0.3
    )
    for function in (ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule):
        o, final = function(
            x["q"],
            x["k"] / 9,
            x["v"],
            x["a"],
            x["b"],
            scale=0.3,
            initial_state=x["state"].transpose(-1, -2),
            output_final_state=True,
            use_gate_in_kernel=True,
            A_log=x["A_log"],
            dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=True,
            state_v_first=True,
        )
        assert final is not None
        assert _close(o, wanted)
        assert _close(final.transpose(-1, -2), state)
    with pytest.raises(ValueError, match="use_gate_in_kernel needs A_log"):
        ops.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["a"], beta, use_gate_in_kernel=True)


@pytest.mark.parametrize("safe", [False, True])
def test_kda_gates_every_channel(x: dict[str, Tensor], safe: bool) -> None:
    dt_bias = torch.randn(HV * K, dtype=torch.float64)
    beta = x["b"].sigmoid()
    logits = x["channel"] + dt_bias.reshape(HV, K)
    rate = x["A_log"].exp()[:, None]
    g = -4.0 * torch.sigmoid(rate * logits) if safe else -rate * F.softplus(logits)
    unit = {n: l2_normalize(x[n]) for n in ("q", "k")}
    wanted, _ = recurrence(unit["q"], unit["k"], x["v"], beta=beta, g=g, rule="delta")
    for function in (ops.chunk_kda, ops.fused_recurrent_kda):
        o, final = function(
            x["q"],
            x["k"],
            x["v"],
            x["channel"],
            beta,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=x["A_log"],
            dt_bias=dt_bias,
            safe_gate=safe,
            lower_bound=-4.0 if safe else None,
        )
        assert final is None
        assert _close(o, wanted)
    with pytest.raises(ValueError, match=r"lower_bound = None, needed a number in \[-5, 0\)"):
        gate_logarithm(x["channel"], x["A_log"], dt_bias, safe=True)


def test_additive_family(x: dict[str, Tensor]) -> None:
    channel, token = F.logsigmoid(x["channel"]), F.logsigmoid(x["a"])
    gamma = retention_decay(HV)
    assert torch.allclose(gamma.double().exp(), 1 - 2.0 ** (-5 - torch.arange(HV, dtype=torch.float64)), rtol=1e-7)
    q, k, v = x["q"], x["k"], x["v"]
    for o, g in (
        (ops.chunk_gla(q, k, v, channel)[0], channel),
        (ops.fused_recurrent_gla(q, k, v, channel)[0], channel),
        (ops.fused_recurrent_gla(q, k, v)[0], None),
        (ops.chunk_simple_gla(q, k, v, token)[0], token),
        (ops.fused_recurrent_simple_gla(q, k, v, token, gamma)[0], token + gamma),
        (ops.chunk_simple_gla(q, k, v, g_gamma=gamma)[0], gamma),
        (ops.chunk_retention(q, k, v)[0], gamma),
        (ops.fused_recurrent_retention(q, k, v)[0], gamma),
    ):
        assert _close(o, recurrence(q, k, v, g=g)[0])


def test_normalised_linear_attention_equals_the_quadratic_form(x: dict[str, Tensor]) -> None:
    q, k = (F.elu(x[n].repeat_interleave(HV // H, dim=2)) + 1 for n in ("q", "k"))
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    wanted = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), x["v"])
    for function in (ops.chunk_linear_attn, ops.fused_recurrent_linear_attn):
        o, state = function(q, k, x["v"], output_final_state=True)
        assert state is not None
        assert torch.allclose(o, wanted, rtol=1e-8)
        assert _close(state[..., -1], k.sum(1))
        first, held = function(q[:, :20], k[:, :20], x["v"][:, :20], output_final_state=True)
        second, _ = function(q[:, 20:], k[:, 20:], x["v"][:, 20:], initial_state=held)
        assert torch.allclose(torch.cat([first, second], 1), wanted, rtol=1e-8)
        plain, bare = function(q, k, x["v"], normalize=False, output_final_state=True)
        assert bare is not None
        assert bare.shape == (B, HV, K, V)
        assert _close(plain, recurrence(q, k, x["v"])[0])
    half = ops.chunk_linear_attn(q.half(), k.half(), x["v"].half())[0]
    assert half.dtype == torch.float16


def test_lightning_attention_and_its_slopes(x: dict[str, Tensor]) -> None:
    q, k, v = x["q"], x["k"], x["v"]
    slopes = ops.build_slope_tensor(HV)
    assert torch.equal(slopes, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    assert torch.equal(ops.build_slope_tensor(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert torch.allclose(ops.build_slope_tensor(HV, 3, 4), slopes * 1e-5)
    linear = ops.build_slope_tensor(HV, 1, 4, kind="linear")
    assert torch.allclose(linear, 0.75 * torch.tensor([0.0, 2.0, 4.0, 6.0]))
    wanted, state = recurrence(q, k, v, g=-slopes.double(), scale=1.0)
    for s in (slopes, slopes.reshape(-1, 1, 1)):
        o, final = ops.lightning_attn_func(q, k, v, s, output_final_state=True)
        assert final is not None
        assert _close(o, wanted)
        assert _close(final, state)
    assert _close(
        ops.lightning_attn_func(q, k, v, 0.5)[0], recurrence(q, k, v, g=torch.full((HV,), -0.5), scale=1.0)[0]
    )
    assert _close(ops.lightning_attn_func(q, k, v)[0], recurrence(q, k, v, scale=1.0)[0])
    for function in (ops.chunk_lightning_attn, ops.fused_recurrent_lightning_attn):
        assert _close(function(q, k, v, 1, 4)[0], recurrence(q, k, v, g=-linear.double())[0])
    pool = torch.zeros(B, HV, K, V)
    steps = [
        ops.lightning_attn_decode(
            q[:, t : t + 1].float(), k[:, t : t + 1].float(), v[:, t : t + 1].float(), slopes, pool
        )
        for t in range(T)
    ]
    assert torch.allclose(torch.cat(steps, 1), wanted.float(), atol=1e-4)
    with pytest.raises(ValueError, match="negative slope or NaN"):
        ops.lightning_attn_func(q, k, v, -slopes)
    with pytest.raises(ValueError, match=r"s has shape \[3\], needed one number or \[HV\] = \[4\]"):
        ops.lightning_attn_func(q, k, v, torch.zeros(3))
    with pytest.raises(ValueError, match="layer_idx and num_layers go together"):
        ops.build_slope_tensor(4, 1)
    with pytest.raises(ValueError, match="kind = 'cubic'"):
        ops.build_slope_tensor(4, kind="cubic")  # type: ignore[arg-type]


def test_gated_delta_rule_decode(x: dict[str, Tensor]) -> None:
    step = {n: v[:, :1].float() for n, v in x.items() if n not in ("A_log", "state")}
    k = l2_normalize(step["k"])
    pool = x["state"].float()
    before = pool.clone()
    out = torch.empty(B, 1, HV, V)
    o = ops.gated_delta_rule_decode(
        step["q"], k, step["v"], pool, a=step["a"], A_log=x["A_log"].float(), b=step["b"], out=out
    )
    assert o is out
    g = gate_logarithm(step["a"], x["A_log"].float(), None)
    wanted, state = recurrence(
        step["q"], k, step["v"], beta=step["b"].sigmoid(), g=g, rule="delta", initial_state=before
    )
    assert torch.allclose(o, wanted, atol=1e-5)
    assert torch.allclose(pool, state, atol=1e-5)
    with pytest.raises(ValueError, match="needed g, or a with A_log"):
        ops.gated_delta_rule_decode(step["q"], k, step["v"], pool, b=step["b"])
    with pytest.raises(ValueError, match="needed beta, or b"):
        ops.gated_delta_rule_decode(step["q"], k, step["v"], pool, g=step["a"])


def test_signatures_are_those_of_flash_linear_attention() -> None:
    common = ["scale", "initial_state", "output_final_state"]
    wanted = {
        "chunk_delta_rule": ["q", "k", "v", "beta", *common],
        "fused_recurrent_delta_rule": ["q", "k", "v", "beta", *common],
        "chunk_gated_delta_rule": ["q", "k", "v", "g", "beta", *common],
        "fused_recurrent_gated_delta_rule": ["q", "k", "v", "g", "beta", *common],
        "chunk_kda": ["q", "k", "v", "g", "beta", *common],
        "chunk_gla": ["q", "k", "v", "g", *common],
        "chunk_simple_gla": ["q", "k", "v", "g", "g_gamma", *common],
        "chunk_retention": ["q", "k", "v", *common],
        "chunk_lightning_attn": ["q", "k", "v", "layer_idx", "num_layers", *common],
        "chunk_hgrn": ["x", "g", "initial_state", "output_final_state"],
    }
    for name, first in wanted.items():
        parameters = list(inspect.signature(getattr(ops, name)).parameters)
        assert parameters[: len(first)] == first, name
        assert "cu_seqlens" in parameters, name
