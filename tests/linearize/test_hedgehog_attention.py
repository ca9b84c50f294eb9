# SPDX-License-Identifier: Apache-2.0
"""Feature maps against their formulas; every form of attention against T x T matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hedgehog_oracle import output, softmax_weights, student_weights

from tilewright.linearize.hedgehog import (
    ELUFeatureMap,
    HedgehogFeatureMap,
    PerformerFeatureMap,
    ReLUFeatureMap,
    attention_entropy,
    hedgehog_attention,
    monotonicity,
    windowed_hedgehog_attention,
)
from tilewright.nn.hedgehog.feature_maps import ACTIVATIONS
from tilewright.testing.bounds import UNIT_ROUNDOFF

LENGTHS = (1, 2, 5, 63, 64, 65, 130)


def inputs(tokens, heads=4, key_heads=2, dim=8, width=5, batch=2, dtype=torch.float64):
    sizes = ((heads, dim), (key_heads, dim), (key_heads, width))
    return tuple(torch.randn(batch, tokens, *size, dtype=torch.float64).to(dtype) for size in sizes)


def maps(heads=4, key_heads=2, dim=8, dtype=torch.float64, activation="softmax_dim"):
    """A pair of maps that are not the identity."""
    pair = [HedgehogFeatureMap(dim, num_heads=n, activation=activation).to(dtype) for n in (heads, key_heads)]
    with torch.no_grad():
        for phi in pair:
            phi.weight += 0.3 * torch.randn(phi.weight.shape, dtype=torch.float64).to(dtype)
    return pair


# --- maps ---------------------------------------------------------------------------------------------------------


def formula(y, activation):
    """The table of the documentation, one element at a time."""
    if activation == "exp":
        return torch.cat((torch.exp(y), torch.exp(-y)), -1)
    if activation == "exp_dim":
        return torch.cat((torch.exp(y - y.max(-1, keepdim=True)[0]), torch.exp(-y + y.min(-1, keepdim=True)[0])), -1)
    if activation == "softmax_dim":
        parts = [torch.exp(s) / torch.exp(s).sum(-1, keepdim=True) for s in (y, -y)]
        return torch.cat(parts, -1)
    both = torch.exp(torch.cat((2 * y, -2 * y), -1))
    return both / both.sum(-1, keepdim=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_identity_map_is_its_formula(activation):
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    phi = HedgehogFeatureMap(8, num_heads=3, activation=activation)
    torch.testing.assert_close(phi(x), formula(x, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_head_has_its_own_matrix_and_bias(activation):
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    phi = HedgehogFeatureMap(8, 6, num_heads=3, activation=activation, bias=True).double()
    with torch.no_grad():
        phi.weight.normal_()
        phi.bias.normal_()
    for h in range(3):
        y = x[:, :, h] @ phi.weight[h] + phi.bias[h]
        torch.testing.assert_close(phi(x)[:, :, h], formula(y, activation), rtol=1e-11, atol=1e-11)


def test_initial_matrices():
    x = torch.randn(5, 2, 16, dtype=torch.float64)
    exp = {t: HedgehogFeatureMap(16, activation="exp", init=t)(x) for t in ("identity", "scaled", 0.5)}
    torch.testing.assert_close(exp["scaled"], formula(x * 16**-0.25, "exp"), rtol=1e-6, atol=0)  # W is float32
    torch.testing.assert_close(exp[0.5], formula(x / 2, "exp"), rtol=1e-12, atol=0)
    wide = HedgehogFeatureMap(4, 6)
    assert torch.equal(wide.weight[0].detach(), torch.eye(4, 6))


def test_exp_and_exp_dim_differ_by_a_factor_of_the_token():
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    exp, shifted = (HedgehogFeatureMap(8, activation=a)(x) for a in ("exp", "exp_dim"))
    ratio = (exp / shifted)[:, 0]
    torch.testing.assert_close(ratio[:, :8], x[:, 0].amax(-1, keepdim=True).exp().expand(-1, 8), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[:, 8:], (-x[:, 0].amin(-1, keepdim=True)).exp().expand(-1, 8), rtol=1e-12, atol=0)


def test_features_stay_positive_and_finite_at_the_extremes():
    x = torch.tensor([[0.0, 1e4, -1e4, 3.0]]).expand(2, 4)[:, None]
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            features = HedgehogFeatureMap(4, activation=activation)(x.to(dtype))
            assert features.dtype == torch.float32
            assert bool(features.isfinite().all())
            assert bool((features >= 0).all())
            assert bool((features.sum(-1) > 0).all())


def test_fixed_maps_are_their_formulas():
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(ELUFeatureMap(8)(x), torch.where(x > 0, x + 1, x.exp()))
    torch.testing.assert_close(ReLUFeatureMap(8)(x), x * (x > 0))


def test_performer_features_estimate_the_softmax_kernel():
    """The mean over draws of the normalised weights' numerators, with their shifts undone, is exp(q . k / sqrt D)."""
    dim, draws = 4, 400
    q, k = (0.5 * torch.randn(1, 3, 1, dim, dtype=torch.float64) for _ in range(2))
    exact = (q[0, :, 0] @ k[0, :, 0].T * dim**-0.5).exp()
    samples = []
    for seed in range(draws):
        phi_q, phi_k = (PerformerFeatureMap(dim, 16, role=role, seed=seed) for role in ("query", "key"))
        raw = phi_q(q)[0, :, 0] @ phi_k(k)[0, :, 0].T
        u = q[0, :, 0] * dim**-0.25
        exponents = u @ phi_q.directions.double().T - u.square().sum(-1, keepdim=True) / 2
        samples.append(raw * exponents.amax(-1, keepdim=True).exp() * math.exp(-30))
    mean, spread = torch.stack(samples).mean(0), torch.stack(samples).std(0) / draws**0.5
    # Five standard errors of nine means; the directions are float32.
    assert bool(((mean - exact).abs() <= 5 * spread + 1e-6).all())


def test_performer_directions_are_orthogonal_in_blocks():
    w = PerformerFeatureMap(8, 16).directions.double()
    unit = w / w.norm(dim=-1, keepdim=True)
    for block in unit.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    assert PerformerFeatureMap(8, 11).directions.shape == (11, 8)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: HedgehogFeatureMap(4, activation="softmax"), "activation"),
        (lambda: HedgehogFeatureMap(4, init="zero"), "init"),
        (lambda: HedgehogFeatureMap(0), "head_dim"),
        (lambda: PerformerFeatureMap(4, role="value"), "role"),
        (lambda: HedgehogFeatureMap(4, num_heads=2)(torch.zeros(1, 3, 4)), "shape"),
        (lambda: HedgehogFeatureMap(4)(torch.zeros(1, 3, 5)), "shape"),
    ],
)
def test_wrong_maps_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("form", ["chunk", "recurrent", "bidirectional"])
def test_float64_forms_equal_the_quadratic_one(form, tokens):
    q, k, v = inputs(tokens)
    phi_q, phi_k = maps()
    causal = form != "bidirectional"
    mode = "recurrent" if form == "recurrent" else "chunk"
    o, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal, mode=mode)
    expected = output(student_weights(q, k, phi_q, phi_k, causal=causal), v)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["chunk", "recurrent", "bidirectional"])
def test_float32_forms_are_as_exact_as_torch(form):
    q, k, v = inputs(130, dtype=torch.float32)
    phi_q, phi_k = maps(dtype=torch.float32)
    causal = form != "bidirectional"
    mode = "recurrent" if form == "recurrent" else "chunk"
    o, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal, mode=mode)
    exact = output(student_weights(q.double(), k.double(), phi_q, phi_k, causal=causal), v.double())
    theirs = output(student_weights(q, k, phi_q, phi_k, causal=causal), v)
    # A row's result is a mean of values; sums of up to 130 positive terms in whatever order lose at most
    # 130 roundings, of which torch's own error shows what is usual.
    bound = 2 * (theirs - exact).abs().max() + 2 * UNIT_ROUNDOFF * v.abs().max()
    assert bool((o - exact).abs().max() <= bound)


def test_nothing_to_attend_to():
    q, k, v = inputs(0)
    phi_q, phi_k = maps()
    for causal in (True, False):
        o, state = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal, output_final_state=True)
        assert o.shape == (2, 0, 4, 5)
        assert torch.equal(state, torch.zeros(2, 4, 16, 6, dtype=torch.float64))
    o, _ = windowed_hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, mix=torch.ones(4), window=3)
    assert o.shape == (2, 0, 4, 5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal):
    q, k, v = inputs(12)
    phi_q, phi_k = maps()
    mask = torch.ones(2, 12)
    mask[0, :4] = 0
    mask[1, 9:] = 0
    o, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal, attention_mask=mask)
    for row, real in ((0, slice(4, 12)), (1, slice(0, 9))):
        cut = (x[row : row + 1, real] for x in (q, k, v))
        alone, _ = hedgehog_attention(*cut, phi_q=phi_q, phi_k=phi_k, causal=causal)
        torch.testing.assert_close(o[row, real], alone[0], rtol=0, atol=1e-12)
    if causal:
        assert torch.equal(o[0, :4], torch.zeros_like(o[0, :4]))  # rows that see no key


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_equal_single_ones(causal):
    q, k, v = inputs(14, batch=1)
    phi_q, phi_k = maps()
    offsets = [0, 5, 5, 6, 14]
    o, state = hedgehog_attention(
        q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal, cu_seqlens=torch.tensor(offsets), output_final_state=True
    )
    for n, (first, last) in enumerate(itertools.pairwise(offsets)):
        cut = (x[:, first:last] for x in (q, k, v))
        alone, end = hedgehog_attention(*cut, phi_q=phi_q, phi_k=phi_k, causal=causal, output_final_state=True)
        torch.testing.assert_close(o[:, first:last], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state[n : n + 1], end, rtol=0, atol=1e-12)


def test_a_state_carries_on():
    q, k, v = inputs(20)
    phi_q, phi_k = maps()
    whole, end = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, output_final_state=True)
    state, pieces = None, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        o, state = hedgehog_attention(
            q[:, part], k[:, part], v[:, part], phi_q=phi_q, phi_k=phi_k, initial_state=state, output_final_state=True
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)
    torch.testing.assert_close(end[..., -1], phi_k(k).repeat_interleave(2, 2).sum(1), rtol=0, atol=1e-12)


def test_key_maps_of_query_heads_see_repeated_keys():
    q, k, v = inputs(9)
    phi_q, phi_k = maps(key_heads=4)
    o, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k)
    torch.testing.assert_close(o, output(student_weights(q, k, phi_q, phi_k), v), rtol=0, atol=1e-12)


def test_cross_attention_and_raw_sums():
    q, k, v = inputs(6)
    phi_q, phi_k = maps()
    o, _ = hedgehog_attention(q[:, :2], k, v, phi_q=phi_q, phi_k=phi_k, causal=False)
    both, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=False)
    torch.testing.assert_close(o, both[:, :2], rtol=0, atol=1e-14)
    raw, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, normalize=False)
    products = torch.einsum("bihf,bjhf->bhij", phi_q(q), phi_k(k).repeat_interleave(2, 2)).tril()
    torch.testing.assert_close(raw, output(products, v), rtol=0, atol=1e-12)


def test_low_precision_and_strided_inputs_are_taken():
    q, k, v = inputs(9)
    phi_q, phi_k = maps(dtype=torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(
        hedgehog_attention(*strided, phi_q=phi_q, phi_k=phi_k)[0],
        hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k)[0],
    )
    for dtype in (torch.bfloat16, torch.float16):
        low = [x.to(dtype) for x in (q, k, v)]
        o, state = hedgehog_attention(*low, phi_q=phi_q, phi_k=phi_k, output_final_state=True)
        assert o.dtype == dtype
        assert state.dtype == torch.float32
        exact, _ = hedgehog_attention(*(x.double() for x in low), phi_q=phi_q, phi_k=phi_k)
        # one rounding to the output's dtype, and float32 arithmetic before it
        bound = torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert bool(((o.double() - exact).abs() <= bound).all())


WINDOWS = [(1, 9), (4, 9), (4, 16), (7, 37), (50, 20)]


@pytest.mark.parametrize(("window", "tokens"), WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
def test_windowed_form_equals_the_quadratic_one(window, tokens, padded):
    q, k, v = inputs(tokens)
    phi_q, phi_k = maps()
    mix = torch.rand(4, dtype=torch.float64) + 0.1
    mask = torch.ones(2, tokens)
    if padded:
        mask[0, :3] = 0
        mask[1, -2:] = 0
    o, _ = windowed_hedgehog_attention(
        q, k, v, phi_q=phi_q, phi_k=phi_k, mix=mix, window=window, attention_mask=mask if padded else None
    )
    expected = output(student_weights(q, k, phi_q, phi_k, window=window, mix=mix, mask=mask), v)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


def test_a_window_over_everything_is_softmax():
    q, k, v = inputs(11)
    phi_q, phi_k = maps()
    mix = torch.full((4,), 0.3, dtype=torch.float64)
    o, _ = windowed_hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, mix=mix, window=11)
    torch.testing.assert_close(o, output(softmax_weights(q, k), v), rtol=0, atol=1e-11)  # eps / 0.3 of the values


@pytest.mark.parametrize("window", [1, 4, 7])
def test_windowed_form_carries_on(window):
    q, k, v = inputs(23)
    phi_q, phi_k = maps()
    mix = torch.rand(4, dtype=torch.float64) + 0.1
    common = {"phi_q": phi_q, "phi_k": phi_k, "mix": mix, "window": window}
    whole, _ = windowed_hedgehog_attention(q, k, v, **common)
    state, pieces, sizes = None, [], set()
    for first, last in ((0, 3), (3, 3), (3, 15), (15, 16), (16, 17), (17, 23)):
        part = [x[:, first:last] for x in (q, k, v)]
        o, state = windowed_hedgehog_attention(*part, **common, past=state, output_final_state=True)
        pieces.append(o)
        sizes.add(tuple(t.shape for t in state))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    assert len(sizes) == 1  # the state's size does not depend on the past


def test_gradients_reach_every_input():
    q, k, v = (x.requires_grad_() for x in inputs(7, batch=1, dim=3, width=2))
    phi_q, phi_k = maps(dim=3)
    mix = torch.rand(4, dtype=torch.float64).add(0.1).requires_grad_()

    def plain(q, k, v, causal):
        return hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, causal=causal)[0]

    def windowed(q, k, v, mix):
        return windowed_hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, mix=mix, window=3)[0]

    assert torch.autograd.gradcheck(lambda *x: plain(*x, True), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: plain(*x, False), (q, k, v))
    assert torch.autograd.gradcheck(windowed, (q, k, v, mix))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": torch.zeros(2, 5, 3, 8)}, "heads"),
        ({"q": torch.zeros(2, 4, 4, 8)}, "S = T"),
        ({"v": torch.zeros(2, 5, 1, 8)}, "needed q"),
        ({"k": torch.zeros(2, 5, 16)}, "dimensions"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
    ],
)
def test_wrong_shapes_are_named(change, word):
    given = {"q": torch.zeros(2, 5, 4, 8), "k": torch.zeros(2, 5, 2, 8), "v": torch.zeros(2, 5, 2, 8)} | change
    phi = HedgehogFeatureMap(8)
    with pytest.raises(ValueError, match=word):
        hedgehog_attention(**given, phi_q=phi, phi_k=phi)
    with pytest.raises(ValueError, match=word):
        windowed_hedgehog_attention(**given, phi_q=phi, phi_k=phi, mix=torch.ones(4), window=2)
    q, k, v = inputs(4)
    with pytest.raises(ValueError, match="window"):
        windowed_hedgehog_attention(q, k, v, phi_q=phi, phi_k=phi, mix=torch.ones(4), window=0)


# --- diagnostics --------------------------------------------------------------------------------------------------


def test_entropy_of_known_rows():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    expected = (torch.tensor(2.0).log() + 0 + torch.tensor(4.0).log()) / 3
    torch.testing.assert_close(attention_entropy(weights).float(), expected)
    torch.testing.assert_close(attention_entropy(weights, causal=False).float(), expected * 3 / 4)


def test_monotonicity_is_the_mean_of_scipys_rank_correlations():
    from scipy.stats import spearmanr

    logits, weights = torch.randn(2, 9, 9), torch.randn(2, 9, 9).relu()  # relu makes ties
    weights[0, 5] = 0.0  # a constant row counts as 0
    for causal in (True, False):
        got = monotonicity(logits, weights, causal=causal)
        for b in range(2):
            rows = []
            for i in range(2 if causal else 0, 9):
                seen = slice(0, i + 1 if causal else 9)
                x, y = logits[b, i, seen].numpy(), weights[b, i, seen].numpy()
                rows.append(0.0 if (y == y[0]).all() else spearmanr(x, y).statistic)
            assert float(got[b]) == pytest.approx(sum(rows) / len(rows), abs=1e-12)


def test_monotonicity_of_softmax_itself_is_one():
    q, k, _ = inputs(12)
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    torch.testing.assert_close(monotonicity(logits, softmax_weights(q, k)), torch.ones(2, 4, dtype=torch.float64))


def test_diagnostics_refuse_other_shapes():
    with pytest.raises(ValueError, match="weights"):
        attention_entropy(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="equal"):
        monotonicity(torch.zeros(3, 3), torch.zeros(2, 3, 3))


def test_larger_identity_is_spikier_and_more_monotone():
    """arXiv 2402.04347, section 3: W = t I with exp features."""
    q, k = (torch.randn(1, 48, 2, 16, dtype=torch.float64) for _ in range(2))
    logits = torch.einsum("bihd,bjhd->bhij", q, k)
    entropies, correlations = [], []
    for t in (1.0, 2.0, 4.0):
        phi = HedgehogFeatureMap(16, activation="exp", init=t)
        a = student_weights(q, k, phi, phi)
        entropies.append(float(attention_entropy(a).mean().detach()))
        correlations.append(float(monotonicity(logits, a).mean().detach()))
    assert entropies[0] > entropies[1] > entropies[2]
    assert min(correlations) > 0
