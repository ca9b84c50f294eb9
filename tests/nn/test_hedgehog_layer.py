# SPDX-License-Identifier: Apache-2.0
"""The Hedgehog layer beyond what all mixers are tested for: rotary positions, and a place in the hybrid model."""

from __future__ import annotations

import torch

from tilewright.nn import HedgehogLinearAttention, build_hybrid
from tilewright.nn.rotary import apply_rotary


def test_rotary_positions_come_before_the_maps():
    mixer = HedgehogLinearAttention(24, 2, rope_theta=100.0, feature_dim=5, bias=True).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (w(x).unflatten(-1, (2, 12)) for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    places = torch.arange(9)[None]
    fq, fk = (m(apply_rotary(y, places, 100.0)) for m, y in ((mixer.phi_q, q), (mixer.phi_k, k)))
    weights = torch.einsum("bihf,bjhf->bhij", fq, fk).tril()
    o = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(-1, keepdim=True) + 1e-12), v)
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(o.flatten(2)), rtol=0, atol=1e-12)


def test_left_padding_with_positions_changes_nothing():
    mixer = HedgehogLinearAttention(24, 2, rope_theta=100.0).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded, _, _ = mixer(x, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[1:, 4:], mixer(x[1:, 4:])[0], rtol=0, atol=1e-12)


def test_a_hybrid_model_takes_it_by_name():
    torch.manual_seed(0)
    model = build_hybrid("hedgehog", "1:1", num_layers=2, hidden_size=24, num_heads=2, vocab_size=30).eval()
    found = [m for m in model.modules() if isinstance(m, HedgehogLinearAttention)]
    assert len(found) == 1
    assert torch.equal(found[0].phi_q.weight[0].detach(), torch.eye(12))
    ids = torch.randint(1, 30, (2, 7))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert bool(found[0].phi_k.weight.grad.abs().sum() > 0)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, ids)
