# SPDX-License-Identifier: Apache-2.0
"""Hybrid language models: layouts, costs, training, generation, files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from tilewright.nn import HybridConfig, HybridForCausalLM, MixerCache, build_hybrid, mixers
from tilewright.nn.hybrid_linear_attention import attention_layers, flops_per_token, hybrid_config, pareto, state_bytes
from tilewright.nn.hybrid_linear_attention.modeling import next_token_loss

VOCABULARY = 40
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 16, "num_heads": 2, "vocab_size": VOCABULARY}
LINEAR = ["deltanet", "gated_deltanet", "kda", "lightning", "retnet", "gla", "hgrn", "hgrn2", "linear_attention"]
EVERYTHING = [*LINEAR, {"mixer": "softmax", "num_kv_heads": 1}, {"mixer": "sliding_window", "window_size": 4}]


def tiny(mixer: str = "gated_deltanet", ratio: Any = "3:1", seed: int = 0, **options: Any) -> HybridForCausalLM:
    torch.manual_seed(seed)
    return build_hybrid(mixer, ratio, **{**SIZES, **options}).eval()


@pytest.fixture(scope="module")
def mixed() -> HybridForCausalLM:
    """One layer of every mixer."""
    torch.manual_seed(5)
    config = HybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_heads=2,
        pattern=EVERYTHING,
        num_hidden_layers=11,
        initializer_range=0.2,
    )
    return HybridForCausalLM(config).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape)


@pytest.mark.parametrize(
    ("ratio", "layers", "placement", "indices"),
    [
        ("24:1", 24, "last", [23]),
        ("24:1", 25, "last", [24]),
        ("12:1", 24, "last", [12]),
        ("6:1", 24, "last", [6, 13, 20]),
        ("3:1", 24, "last", [3, 7, 11, 15, 19, 23]),
        ("1:1", 4, "last", [1, 3]),
        ("3:1", 8, "middle", [2, 6]),
        ("24:1", 24, "middle", [12]),
        ("3:1", 8, "first", [0, 4]),
        ("pure", 5, "last", []),
        ("full", 3, "last", [0, 1, 2]),
        ([4, 0], 5, "last", [0, 4]),
        ([], 5, "last", []),
    ],
)
def test_layout(ratio, layers, placement, indices):
    assert attention_layers(ratio, layers, placement) == indices


@pytest.mark.parametrize("ratio", range(1, 30))
def test_layout_is_the_published_rule(ratio):
    """Index i is full where (i + 1) mod (r + 1) = 0, or the last layer where that falls outside."""
    rule = [i for i in range(24) if (i + 1) % (ratio + 1) == 0]
    assert attention_layers(f"{ratio}:1", 24) == (rule or [23])


@pytest.mark.parametrize("ratio", ["0:1", "-3:1", "3:2", "3", "most", "x:1", [5], [-1], [1, 1]])
def test_bad_layouts_are_refused(ratio):
    with pytest.raises(ValueError, match="attention_layers"):
        attention_layers(ratio, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "gated_deltanett"}, "did you mean gated_deltanet"),
        ({"mixer_options": {"expnd_v": 1}}, "'expnd_v' is unknown"),
        ({"attention_options": {"windows": 4}}, "'windows'"),
        ({"num_heads": 3}, "not a multiple of num_heads = 3"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"pattern": ["gla", "softmax", "gla"]}, "does not repeat to num_hidden_layers = 4"),
        ({"pattern": [{"window_size": 3}]}, "names no 'mixer'"),
    ],
)
def test_bad_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("name", LINEAR)
def test_prefill_and_steps_equal_the_whole(name):
    """The bound is the specification's."""
    model, ids = tiny(name, initializer_range=0.2), tokens(2, 14)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        logits = [first.logits]
        for t in range(9, 14):
            logits.append(model(ids[:, t : t + 1], past_key_values=first.cache).logits)
    got = torch.cat(logits, 1)
    assert (got - whole).norm() <= 1e-4 * whole.norm()
    assert isinstance(first.cache, MixerCache)
    assert first.cache.get_seq_length() == 14


@torch.no_grad()
def test_greedy_generation_equals_no_cache(mixed):
    ids = tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    got = mixed.generate(ids, **options)
    assert torch.equal(got, mixed.generate(ids, use_cache=False, **options))
    step = ids
    for _ in range(12):
        step = torch.cat((step, mixed(step, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, step)


@torch.no_grad()
def test_a_padded_batch_generates_what_each_prompt_does(mixed):
    prompts = [tokens(9), tokens(3), tokens(6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = mixed.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 9:], mixed.generate(prompt[None], **options)[0, len(prompt) :])


@torch.no_grad()
def test_beams_with_a_cache_equal_beams_without(mixed):
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 6)
    assert torch.equal(mixed.generate(ids, **options), mixed.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_generation_goes_on_from_a_cache(mixed):
    ids = tokens(1, 6)
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = mixed.generate(ids, max_new_tokens=4, **options)
    again = mixed.generate(first.sequences, max_new_tokens=4, cache=first.cache, **options)
    assert torch.equal(again.sequences, mixed.generate(ids, max_new_tokens=8, **options).sequences)


def test_a_cache_of_another_kind_is_refused(mixed):
    with pytest.raises(ValueError, match="MixerCache is needed"):
        mixed(tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        mixed.generate(tokens(1, 3), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        mixed()


def test_packed_sequences_have_the_losses_and_gradients_of_each_alone(mixed):
    model, lengths = copy.deepcopy(mixed).double(), [5, 1, 8]
    ids = tokens(1, 14)
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 6, 14]))
    packed.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    # A sequence of one token asks nothing; the others ask for 4 and 7.
    total = sum(model(piece, labels=piece, num_items_in_batch=11).loss for piece in ids.split(lengths, 1))
    total.backward()
    assert abs(total - packed.loss) <= 1e-10
    for p, need in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - need).norm() <= 1e-10 * need.norm()


def test_loss_is_the_mean_log_probability_of_the_next_token():
    logits, labels = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(5, (2, 6))
    labels[1, 3] = -100
    chances = logits.log_softmax(-1)
    asked = [(b, t) for b in range(2) for t in range(5) if labels[b, t + 1] >= 0]
    need = -torch.stack([chances[b, t, labels[b, t + 1]] for b, t in asked]).mean()
    torch.testing.assert_close(next_token_loss(logits, labels), need)
    torch.testing.assert_close(next_token_loss(logits, labels, num_items=3), need * 9 / 3)
    with pytest.raises(ValueError, match="labels with logits_to_keep"):
        next_token_loss(logits[:, :3], labels)


def test_logits_to_keep_and_hidden_states(mixed):
    ids = tokens(2, 5)
    whole = mixed(ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(mixed(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert torch.equal(mixed(ids, logits_to_keep=torch.tensor([1, 3])).logits, whole.logits[:, [1, 3]])
    assert len(whole.hidden_states) == 12
    assert torch.equal(mixed.lm_head(whole.hidden_states[-1]), whole.logits)
    embedded = mixed(inputs_embeds=mixed.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, whole.logits)


def test_one_seed_gives_one_start_to_all_that_variants_share():
    torch.manual_seed(3)
    first, draw = build_hybrid("deltanet", "3:1", **SIZES), torch.rand(4)
    torch.manual_seed(3)
    second, same = build_hybrid("hgrn", "1:1", **SIZES), torch.rand(4)
    other = build_hybrid("deltanet", "3:1", **SIZES)
    assert torch.equal(draw, same)
    ours, theirs, others = (dict(m.named_parameters()) for m in (first, second, other))
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    # Embedding, head, every feed-forward, the softmax layer 3, and the deltanet's q_proj beside the softmax's.
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mixer.k_proj.weight"):
        assert name in shared
    assert sum(".mlp." in name for name in shared) == 12
    assert all(torch.equal(ours[n], theirs[n]) for n in shared)
    assert not any(torch.equal(p, others[n]) for n, p in ours.items() if p.dim() == 2)
    layers = [ours[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]
    assert not torch.equal(layers[0], layers[1])
    assert float(torch.stack(layers).detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_files_hold_the_whole_model(mixed, tmp_path, tied):
    config = copy.deepcopy(mixed.config)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model, ids = HybridForCausalLM(config).eval(), tokens(1, 6)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HybridForCausalLM
    assert again.config.layer_specs == model.config.layer_specs
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_parameters_missing_from_a_file_are_drawn_and_the_others_kept(tmp_path):
    model = tiny("gated_deltanet")
    with torch.no_grad():
        model.model.layers[0].mixer.A_log.fill_(0.25)
    state = model.state_dict()
    del state["model.layers.0.mixer.dt_bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    mixer = again.model.layers[0].mixer
    assert (mixer.A_log == 0.25).all()
    steps = nn.functional.softplus(mixer.dt_bias)
    assert ((steps > 0.9e-3) & (steps < 1.1e-1)).all()


def test_a_vocabulary_can_grow():
    model = tiny()
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[:VOCABULARY], before)
    new = model.lm_head.weight[VOCABULARY:], model.model.embed_tokens.weight[VOCABULARY:]
    assert not torch.equal(*new)
    assert model(torch.tensor([[VOCABULARY + 2]])).logits.shape[-1] == VOCABULARY + 3


@torch.no_grad()
def test_half_precision_loads_and_generates(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    model = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=True, pad_token_id=0, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 9)
    states = {layer["recurrent_state"].dtype for layer in out.cache.layers if "recurrent_state" in layer}
    assert states == {torch.float32}


def test_assisted_generation_is_refused(mixed):
    with pytest.raises(ValueError, match="stateful"):
        mixed.generate(tokens(1, 5), assistant_model=tiny(), max_new_tokens=2, pad_token_id=0)


def test_training_has_no_cache_unless_asked(mixed):
    assert mixed(tokens(1, 3)).cache.get_seq_length() == 3
    model = copy.deepcopy(mixed).train()
    assert model(tokens(1, 3)).cache is None
    assert model(tokens(1, 3), use_cache=True).cache.get_seq_length() == 3


def test_lower_bounds_rise_with_depth():
    model = tiny("hgrn", "pure")
    bounds = model.model.lower_bounds["hgrn_16"]
    nn.init.normal_(bounds.table)
    seen = []
    for block in model.model.layers:
        block.mixer.register_forward_pre_hook(
            lambda _, __, options: seen.append(options.get("lower_bound")), with_kwargs=True
        )
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    assert seen[0] is None
    assert all(torch.equal(got, need) for got, need in zip(seen[1:], bounds()[1:], strict=True))
    assert bounds.table.grad.abs().sum() > 0


def test_gradient_checkpoints_change_nothing(mixed):
    model, ids = copy.deepcopy(mixed).train(), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, need) for p, need in zip(model.parameters(), plain, strict=True))


def test_compiles_without_a_break():
    model, ids = tiny(pattern=["kda", "hgrn2", "softmax"], num_layers=3).train(), tokens(2, 5)
    need = model(ids, labels=ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(ids, labels=ids)
    # One graph of the same float32 operations; the bound is that of two evaluations of the logits.
    assert (got.logits - need.logits).norm() <= 1e-5 * need.logits.norm()
    got.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class CountedArithmetic(TorchDispatchMode):
    """Multiplies and adds, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mul", "add", "sub", "rsub"):
            self.count += result.numel()
        elif name == "sum":
            self.count += args[0].numel()
        return result


def counted_step(name: str, heads: int, keys: int, values: int, seen: int) -> int:
    """Arithmetic of one token as the papers write its recurrence, for all heads."""
    q, k, v = torch.randn(heads, keys, 1), torch.randn(heads, keys, 1), torch.randn(heads, 1, values)
    state, decay, beta = torch.randn(heads, keys, values), torch.rand(heads, keys, 1), torch.rand(heads, 1, 1)
    past_keys, past_values = torch.randn(heads, seen, keys), torch.randn(heads, seen, values)
    with CountedArithmetic() as counted:
        if name == "softmax":
            scores = (past_keys * q.mT).sum(-1, keepdim=True)
            (scores * past_values).sum(1)
        elif name == "hgrn":
            h, a, i, gate = (torch.randn(heads * values) for _ in range(4))
            (a * h + (1 - a) * i) * gate
        else:
            if name not in ("deltanet", "linear_attention"):
                state = state * (decay if name in ("gla", "hgrn2", "kda") else decay[:, :1])
            if name in ("deltanet", "gated_deltanet", "kda"):
                v = beta * (v - (state * k).sum(1, keepdim=True))
            if name == "linear_attention":
                v, state = torch.cat((v, torch.ones(heads, 1, 1)), -1), torch.randn(heads, keys, values + 1)
            ((state + k * v) * q).sum(1)
    return counted.count


COUNTED = {
    "deltanet": (16, 16),
    "gated_deltanet": (16, 32),
    "kda": (16, 16),
    "lightning": (16, 16),
    "retnet": (16, 32),
    "gla": (8, 16),
    "hgrn2": (16, 16),
    "hgrn": (16, 16),
    "linear_attention": (16, 16),
}


@pytest.mark.parametrize("name", COUNTED)
def test_cost_equals_the_counted_arithmetic(name):
    """Within the specification's 10%."""
    config = hybrid_config(name, "pure", **{**SIZES, "hidden_size": 64, "num_heads": 4})
    keys, values = COUNTED[name]
    counted = 4 * counted_step(name, 4, keys, values, 0)
    assert flops_per_token(config, 100) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("window", [None, 9])
def test_cost_of_softmax_is_the_mean_over_a_sequence(window):
    options = {"attention_options": {"window_size": window}}
    config = hybrid_config("gla", "full", **{**SIZES, "hidden_size": 64, "num_heads": 4, **options})
    steps = [min(t, window or t) for t in range(1, 31)]
    counted = 4 * sum(counted_step("softmax", 4, 16, 16, seen) for seen in steps) / 30
    assert flops_per_token(config, 30) == pytest.approx(counted, rel=1e-9)


def test_costs_of_the_paper():
    sizes = {**SIZES, "hidden_size": 64, "num_heads": 4}
    per_layer = {"retnet": 5 * 1024, "gla": 7 * 1024, "hgrn2": 7 * 1024, "deltanet": 8 * 1024, "hgrn": 5 * 64}
    for name, need in per_layer.items():
        config = hybrid_config(name, "3:1", **sizes)
        assert flops_per_token(config, 100, "paper") == 3 * need + 2 * 100 * 64
    with pytest.raises(ValueError, match="no figure for 'kda'"):
        flops_per_token(hybrid_config("kda", "pure", **sizes), 10, "paper")
    with pytest.raises(ValueError, match="context_length = 0"):
        flops_per_token(hybrid_config("kda", "pure", **sizes), 0)


@torch.no_grad()
def test_state_bytes_are_those_of_the_cache(mixed):
    for length in (1, 3, 20):
        cache = mixed(tokens(1, length), use_cache=True).cache
        held = state_bytes(mixed.config, length, cache_bytes=4)
        assert held["total"] == cache.nbytes
        assert held["key_value"] == sum(
            t.nbytes for layer in cache.layers for n, t in layer.items() if n in ("key", "value")
        )


def test_a_quarter_of_the_layers_keeps_a_quarter_of_the_keys():
    full, mixed = (state_bytes(hybrid_config("hgrn2", r, **SIZES), 4096) for r in ("full", "3:1"))
    assert mixed["key_value"] * 4 == full["key_value"]
    assert full["state"] == 0 < mixed["state"]


def test_pareto_keeps_what_is_cheaper_or_better():
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 2.5), "d": (3.0, 2.0), "e": (4.0, 1.0)}
    assert pareto(points) == ["a", "b", "e"]


def test_a_pattern_takes_a_mixer_from_outside(monkeypatch):
    """A class of the common signature is enough; it needs no base class."""

    class Shift(nn.Module):
        def __init__(self, hidden_size: int, num_heads: int, layer_idx: int) -> None:
            super().__init__()
            assert (hidden_size, num_heads) == (16, 2)
            self.scale, self.layer_idx = nn.Parameter(torch.ones(hidden_size)), layer_idx

        def forward(self, hidden_states, past_key_values=None, **options):
            assert options["position_ids"].shape == hidden_states.shape[:1] + hidden_states.shape[1:2]
            return nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1] * self.scale, None, past_key_values

    known = {**mixers.discover(), "shift": Shift}
    monkeypatch.setattr(mixers, "discover", lambda: known)
    model = tiny(pattern=["shift", "gla"])
    assert model.config.layer_names == ["shift", "gla", "shift", "gla"]
    assert (model.model.layers[2].mixer.scale == 1).all()
    assert model(tokens(1, 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="Shift does not state its cost"):
        flops_per_token(model.config, 10)
