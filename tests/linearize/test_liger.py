# SPDX-License-Identifier: Apache-2.0
"""Liger against its definition token by token, and a converted model's decoding against its full forward pass."""

from __future__ import annotations

import pytest
import torch
from converted_models import TYPES, angles, tiny_model

from tilewright.linearize.cache import state_nbytes
from tilewright.linearize.conversion import converted_layers
from tilewright.linearize.liger import LigerConfig, LigerRecipe, convert_to_liger, liger_attention
from tilewright.linearize.liger.recurrence import pooled, slot_scores
from tilewright.linearize.runner import Runner
from tilewright.models.hf_names import cache_name
from tilewright.reference.liger import liger

FORMS = [
    {"variant": "gla"},
    {"variant": "gla", "pool": 4},
    {"variant": "gla", "normalize": True},
    {"variant": "hgrn2"},
    {"variant": "hgrn2", "normalize": True},
    {"variant": "gsa"},
    {"variant": "gsa", "pool": 8},
]
IDS = [" ".join(str(v) for v in form.values()) for form in FORMS]


def inputs(tokens, dtype=torch.float64, batch=1, **options):
    made = [torch.randn(batch, tokens, h, 16, dtype=torch.float64) for h in (6, 2, 2)]
    return [x.to(dtype).requires_grad_(options.get("grad", False)) for x in made]


def oracle(q, k, v, turn, form, window):
    named = {"variant": form["variant"], "slots": form.get("pool"), "normalize": form.get("normalize", False)}
    return liger(q.double(), k.double(), v.double(), turn, window=window, **named)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_both_forms_equal_the_loop_over_tokens(form, mode):
    for tokens, window in ((1, 7), (6, 7), (7, 7), (61, 7), (40, 64)):
        q, k, v = inputs(tokens, torch.float32)
        turn, cos, sin = angles(tokens, dtype=torch.float32)
        got = liger_attention(q, k, v, cos=cos, sin=sin, window_size=window, mode=mode, **form)
        torch.testing.assert_close(got.double(), oracle(q, k, v, turn, form, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_gradients_equal_autograd_through_the_loop(form):
    some = inputs(37, grad=True)
    turn, cos, sin = angles(37)
    probe = torch.randn(1, 37, 6, 16, dtype=torch.float64)
    got = torch.autograd.grad((liger_attention(*some, cos=cos, sin=sin, window_size=5, **form) * probe).sum(), some)
    want = torch.autograd.grad((oracle(*some, turn, form, 5) * probe).sum(), some)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_extreme_gate_logits(form):
    """Logits of -100 and 100 forget everything or nothing; no exponential overflows."""
    q, k, v = inputs(50)
    k = torch.where(torch.rand_like(k) < 0.5, -100.0, 100.0).to(k)
    turn, cos, sin = angles(50)
    want = oracle(q, k, v, turn, form, 9)
    assert want.isfinite().all()
    for mode in ("chunk", "recurrent"):
        got = liger_attention(q, k, v, cos=cos, sin=sin, window_size=9, mode=mode, **form)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_no_token_gives_no_output():
    q, k, v = inputs(0)
    _, cos, sin = angles(0)
    for variant in ("gla", "hgrn2", "gsa"):
        assert liger_attention(q, k, v, cos=cos, sin=sin, variant=variant).shape == (1, 0, 6, 16)


def test_bfloat16_is_computed_in_float32():
    q, k, v = (x.to(torch.bfloat16) for x in inputs(30))
    turn, cos, sin = angles(30, dtype=torch.float32)
    got = liger_attention(q, k, v, cos=cos, sin=sin)
    assert got.dtype == torch.float32
    # the same numbers in float64: rotation in bfloat16 would be visible at 1e-3
    torch.testing.assert_close(got.double(), oracle(q, k, v, turn, FORMS[0], 64), rtol=0, atol=1e-5)


def test_pools():
    f = torch.arange(8.0).view(1, 1, 1, 8)
    assert pooled(f, LigerConfig(pool=2)).flatten().tolist() == [1.5] * 4 + [5.5] * 4
    assert pooled(f, LigerConfig(variant="gsa", pool=2)).flatten().tolist() == [1.5, 5.5]
    with pytest.raises(ValueError, match="does not divide"):
        pooled(f, LigerConfig(pool=3))
    with pytest.raises(ValueError, match="pool=5 does not divide the head size 16"):
        convert_to_liger(tiny_model(), pool=5)


def test_slot_scores_do_not_depend_on_the_chunk():
    q = torch.randn(2, 33, 2, 3, 4, dtype=torch.float64)
    k = torch.randn(2, 33, 2, 4, dtype=torch.float64)
    g = -torch.rand(2, 33, 2, 5, dtype=torch.float64)
    start = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    want, last = slot_scores(q, k, -torch.expm1(g), g, start, chunk=1)
    for chunk in (2, 16, 40):
        got, state = slot_scores(q, k, -torch.expm1(g), g, start, chunk=chunk)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("variant", ["gla", "hgrn2", "gsa"])
def test_prefill_and_decode_equal_the_full_forward(kind, variant):
    """Greedy generation of 32 tokens behind 100: the tokens, and the logits of every step."""
    model = convert_to_liger(tiny_model(kind), variant, window_size=9, softmax_layers=[1])
    runner, ids = Runner(model, 200), torch.randint(3, 97, (100,)).tolist()
    made, rows = list(ids), []
    for _ in range(32):
        rows.append(runner.forward(made[len(runner.held) :])[0])
        made.append(int(rows[-1].argmax()))
    full = Runner(model, 200).logits(made[:-1])[99:]
    torch.testing.assert_close(torch.stack(rows), full, rtol=0, atol=1e-4)
    assert full.argmax(-1).tolist() == made[100:]
    assert list(Runner(model, 200).generate(ids, max_new_tokens=32, stop_tokens=())) == made[100:]


@pytest.mark.parametrize(
    ("variant", "normalize"), [("gla", False), ("gla", True), ("hgrn2", False), ("hgrn2", True), ("gsa", False)]
)
def test_padding_changes_no_token(variant, normalize):
    """Left, right and inner padding, then decoding: each row as if it were alone."""
    model = convert_to_liger(tiny_model(), variant, window_size=6, normalize=normalize)
    rows = [torch.randint(3, 97, (n,)) for n in (20, 13, 1)]
    ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    places = [torch.arange(4, 24), torch.cat([torch.arange(5), torch.arange(9, 17)]), torch.tensor([23])]
    position = torch.zeros(3, 24, dtype=torch.long)
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place], position[i, place] = row, 1, torch.arange(len(row))
        position[i, place[-1] + 1 :] = len(row) - 1
    # a padded position between tokens stands at the position before it, so that positions never fall
    position[1, 5:9] = 4
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            torch.testing.assert_close(out.logits[i, place], model(row[None]).logits[0], rtol=0, atol=1e-4)
        cache = {cache_name(): getattr(out, cache_name())}
        longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        at = torch.tensor([[20], [13], [1]])
        step = model(torch.full((3, 1), 8), attention_mask=longer, position_ids=at, **cache).logits
        for i, row in enumerate(rows):
            alone = model(torch.cat([row, torch.tensor([8])])[None]).logits[0, -1]
            torch.testing.assert_close(step[i, 0], alone, rtol=0, atol=1e-4)


def test_generate_of_transformers_with_padding_and_beams():
    model = convert_to_liger(tiny_model(), window_size=6, every=2)
    ids = torch.randint(3, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    plain = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    both = model.generate(ids, attention_mask=mask, **plain)
    assert both[0, 12:].tolist() == model.generate(ids[:1, 5:], **plain)[0, 7:].tolist()
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **plain)
    without = model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **plain)
    assert torch.equal(beams, without)


def test_memory_does_not_grow_with_the_text():
    model = convert_to_liger(tiny_model(), window_size=8)
    runner = Runner(model, 400)
    runner.forward([5] * 10)
    small = state_nbytes(runner.cache)
    for _ in range(20):
        runner.forward([7] * 13)
    assert state_nbytes(runner.cache) == small
    # per layer: the state and 7 rotated keys and values of 2 heads, and a flag for each of the 7
    assert small == 3 * (2 * 16 * 16 * 4 + 2 * 7 * 2 * 16 * 4 + 7)


def test_gates_for_comparison():
    base = tiny_model()
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad():
        logits = {gate: _converted(base, LigerConfig(gate=gate))(ids).logits for gate in ("key", "random", "none")}
    assert not torch.allclose(logits["key"], logits["none"])
    assert not torch.allclose(logits["key"], logits["random"])
    layers = converted_layers(_converted(base, LigerConfig(gate="random")))
    gates = [layer.gate_matrix for layer in layers.values()]
    assert not torch.equal(gates[0], gates[1])


def _converted(base, config):
    from tilewright.linearize import convert

    return convert(base, "liger", config)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"variant": "rwkv"}, "variant='rwkv'"),
        ({"window_size": 0}, "window_size=0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": 0.0, "beta": 0.0}, "nothing would be left"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"pool": 0}, "pool=0"),
        ({"normalize": True, "variant": "gsa"}, "normalized already"),
        ({"gate": "none", "variant": "hgrn2"}, "gate='none'"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer=0"),
    ],
)
def test_wrong_settings_are_named(settings, what):
    with pytest.raises(ValueError, match=what):
        LigerConfig(**settings)


def test_settings_survive_json():
    config = LigerConfig(variant="gsa", pool=8, alpha=0.25)
    assert LigerConfig.from_dict(config.to_dict()) == config
    recipe = LigerRecipe(steps=3, lr=1e-2)
    assert LigerRecipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="did you mean 'window_size'"):
        LigerConfig.from_dict({"windowsize": 3})
    with pytest.raises(ValueError, match="steps=-1"):
        LigerRecipe(steps=-1)


def test_an_unknown_mode_is_named():
    q, k, v = inputs(3)
    _, cos, sin = angles(3)
    with pytest.raises(ValueError, match="mode='scan'"):
        liger_attention(q, k, v, cos=cos, sin=sin, mode="scan")
