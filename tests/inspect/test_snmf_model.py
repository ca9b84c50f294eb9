# SPDX-License-Identifier: Apache-2.0
"""Activations, detection, steering and reading of features on small transformers models with random weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tilewright.data.concepts import WEEKDAYS, concepts, weekday_sentences
from tilewright.inspect.snmf import (
    NextToken,
    TokenIndex,
    auroc,
    best_feature,
    collect_mlp_activations,
    concept_detection_score,
    diff_mean,
    feature_neurons,
    find_alpha_for_kl,
    find_alphas_for_kl,
    labelled_neuron,
    mlp_site,
    random_sparse,
    sentence_maximum,
    sentence_scores,
    steer,
    top_tokens,
    vocab_projection,
)

VOCABULARY = 60
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}  # fmt: skip


class Letters:
    """Tokens of the characters; 0 pads."""

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(c) % (VOCABULARY - 1) for c in text]}

    def decode(self, ids):
        return "".join(chr(65 + i % 26) for i in ids)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=32, word_embed_proj_dim=16)
    ).eval()  # fmt: skip


def gemma2():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("feedforward_layernorm.weight"):
            torch.nn.init.normal_(parameter)
    return model


TEXTS = ["one", "three words here", "xy", "another text"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (llama, "model.layers.1.mlp.down_proj"),
        (gpt2, "transformer.h.1.mlp.c_proj"),
        (opt, "model.decoder.layers.1.fc2"),
        (gemma2, "model.layers.1.mlp.down_proj"),
    ],
)
def test_activations_are_the_inputs_of_the_down_projection(make, name):
    model, tokenizer = make(), Letters()
    assert mlp_site(model, 1) == name
    x, index = collect_mlp_activations(model, tokenizer, TEXTS, 1, batch_size=3)
    wanted = []
    for text in TEXTS:
        seen = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        with torch.no_grad():
            model(torch.tensor([tokenizer(text)["input_ids"]]))
        hook.remove()
        wanted.append(seen[0].reshape(len(text), -1)[1:])
    # One text alone and padded among others: float32 sums in another order.
    assert torch.allclose(x, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert len(index) == len(x) == sum(len(text) - 1 for text in TEXTS)
    assert index.sentence.tolist() == [n for n, text in enumerate(TEXTS) for _ in text[1:]]
    assert index.position.tolist() == [p for text in TEXTS for p in range(1, len(text))]
    assert index.token.tolist() == [t for text in TEXTS for t in tokenizer(text)["input_ids"][1:]]
    whole, all_index = collect_mlp_activations(model, tokenizer, TEXTS, name, drop_first=False)
    assert len(whole) == len(all_index) == sum(map(len, TEXTS))
    assert torch.allclose(whole[all_index.position > 0], x, rtol=1e-4, atol=1e-5)


def test_wrong_layers_and_texts_are_named():
    model = llama()
    for wrong, words in ((3, "layers 0 to 2"), ("model.layers.9", "no module")):
        with pytest.raises(ValueError, match=words):
            mlp_site(model, wrong)
    with pytest.raises(ValueError, match="full name"):
        mlp_site(torch.nn.Sequential(torch.nn.Linear(2, 2)), 0)
    for texts, words in ((["ab", ""], r"texts\[1\]"), ([], "at least one"), ("ab", "a list"), (["a"], "single token")):
        with pytest.raises(ValueError, match=words):
            collect_mlp_activations(model, Letters(), texts, 0)


def small_index():
    """Three texts of 3, 2 and 1 kept tokens."""
    return TokenIndex(
        torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 2, 3, 1, 2, 1]), torch.arange(6),
        [[9, 0, 1, 2], [9, 3, 4], [9, 5]],
    )  # fmt: skip


def test_scores_of_texts_are_the_largest_over_their_tokens():
    index, values = small_index(), torch.tensor([[1.0], [3.0], [2.0], [-1.0], [-2.0], [5.0]])
    assert sentence_maximum(values, index)[:, 0].tolist() == [3, -1, 5]
    x = torch.randn(6, 7)
    v = torch.randn(2, 7)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], v[None], dim=-1)
    assert torch.allclose(sentence_scores(v, x, index), sentence_maximum(cosine, index), atol=1e-6)
    pearson = torch.tensor(np.corrcoef(np.vstack([v, x]))[:2, 2:].T).float()
    assert torch.allclose(sentence_scores(v, x, index, "correlation"), sentence_maximum(pearson, index), atol=1e-5)
    assert torch.allclose(sentence_scores(v, x, index, "r2"), sentence_maximum(pearson**2, index), atol=1e-5)
    with pytest.raises(ValueError, match="measure='dot'"):
        sentence_scores(v, x, index, "dot")


def test_auroc_is_scikit_learns_column_by_column():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, (40, 3)).astype(float)
    labels = random.random(40) < 0.3
    np.testing.assert_allclose(auroc(scores, labels), [roc_auc_score(labels, column) for column in scores.T])
    with pytest.raises(ValueError, match="both kinds"):
        auroc(scores, np.ones(40, dtype=bool))


def test_concept_score_and_its_floor():
    index = small_index()
    x = torch.zeros(6, 4)
    x[1, 0], x[4], x[5] = 2.0, torch.tensor([1.0, 1, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    score = concept_detection_score([3.0, 0, 0, 0], x, index, [0], [1])
    assert score.positive_mean == pytest.approx(1)
    assert score.score == pytest.approx(math.log(1 / math.sqrt(0.5)), rel=1e-6)
    assert score.auroc == 1
    assert not score.floored
    floored = concept_detection_score([1.0, 0, 0, 0], x, index, [0], [2])
    assert floored.floored
    assert floored.score == pytest.approx(math.log(1 / 1e-3))
    with pytest.raises(ValueError, match="at least one row"):
        concept_detection_score([1.0, 0, 0, 0], x, index, [0], [])


def test_labelled_baselines_find_what_was_planted():
    texts = 16  # so many that no other of 30 neurons parts 8 from 8 by chance
    index = TokenIndex(
        torch.arange(texts), torch.ones(texts, dtype=torch.int64), torch.zeros(texts), [[9, 0] for _ in range(texts)]
    )
    x = torch.randn(texts, 30) * 0.1
    x[:8, 11] -= 4
    vector, neuron, area = labelled_neuron(x, index, range(8), range(8, texts))
    assert (neuron, area, float(vector[11]), int(vector.count_nonzero())) == (11, 1.0, -1.0, 1)
    direction = diff_mean(x, index, range(8), range(8, texts))
    assert int(direction.abs().argmax()) == 11
    assert float(direction.norm()) == pytest.approx(1, rel=1e-6)
    index = small_index()
    feature, area = best_feature(torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 3), index, [0], [1, 2])
    assert (feature, area) == (1, 1.0)


def test_random_direction_is_sparse_unit_and_seeded():
    v = random_sparse(200, 5, seed=3)
    assert int(v.count_nonzero()) == 5
    assert float(v.norm()) == pytest.approx(1, rel=1e-6)
    assert torch.equal(v, random_sparse(200, 5, seed=3))
    assert not torch.equal(v, random_sparse(200, 5, seed=4))


def test_steering_adds_the_unit_vector_to_the_mlp_activation():
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    vector = torch.randn(24)
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: (args[0] + 2.5 * vector / vector.norm(),))
    with torch.no_grad():
        wanted = model(ids).logits
    hook.remove()
    with torch.no_grad(), steer(model, 1, vector, 2.5):
        found = model(ids).logits
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="vector has 5 values"), steer(model, 1, torch.ones(5), 1.0):
        pass


def test_models_that_normalise_the_mlps_output_are_steered_behind_the_norm():
    model, ids = gemma2(), torch.tensor([[3, 4, 5]])
    vector = torch.randn(24)
    block = model.model.layers[1]
    with torch.no_grad():
        shift = block.post_feedforward_layernorm(block.mlp.down_proj(vector / vector.norm()))
    hook = block.post_feedforward_layernorm.register_forward_hook(lambda *args: args[2] + 1.5 * shift)
    with torch.no_grad():
        wanted = model(ids).logits
    hook.remove()
    with torch.no_grad(), steer(model, 1, vector, 1.5):
        assert torch.allclose(model(ids).logits, wanted, rtol=1e-5, atol=1e-6)


PROMPTS = ("abc", "de", "fgh", "i")


def test_many_directions_at_once_are_what_steer_gives_one_by_one():
    model, tokenizer = llama(), Letters()
    vectors, alphas = torch.randn(3, 24), torch.tensor([0.5, 2.0, 8.0])
    sets = [[1, 2], [7]]
    kl, moved = NextToken(model, tokenizer, 1, PROMPTS).measure(vectors, alphas, sets)
    order = sorted(range(4), key=lambda i: [3, 2, 1].index(len(PROMPTS[i])))
    for r in range(3):
        divergences = []
        for place, i in enumerate(order):
            ids = torch.tensor([tokenizer(PROMPTS[i])["input_ids"]])
            with torch.no_grad():
                base = model(ids).logits[0, -1].double().log_softmax(-1)
                with steer(model, 1, vectors[r], float(alphas[r])):
                    now = model(ids).logits[0, -1].double().log_softmax(-1)
            divergences.append(float((base.exp() * (base - now)).sum()))
            for s, tokens in enumerate(sets):
                gain = float(now[tokens].logsumexp(-1) - base[tokens].logsumexp(-1))
                assert float(moved[r, place, s]) == pytest.approx(gain, abs=2e-5)
        # Logits of float32 are right to about 1e-6, and so is their KL.
        assert float(kl[r]) == pytest.approx(np.mean(divergences), abs=1e-5)


@pytest.mark.parametrize("negative", [False, True])
def test_strength_reaches_the_kl(negative):
    model, tokenizer = llama(), Letters()
    vector = torch.randn(24)
    found = find_alpha_for_kl(model, tokenizer, 0, vector, 0.02, prompts=PROMPTS, negative=negative)
    assert found.reached
    assert (found.alpha < 0) is negative
    probe = NextToken(model, tokenizer, 0, PROMPTS)
    kl, _ = probe.measure(vector[None], torch.tensor([found.alpha]))
    assert float(kl) == pytest.approx(0.02, rel=0.0501)


def test_unreachable_kl_is_said_and_a_bad_target_refused():
    probe = NextToken(llama(), Letters(), 0, PROMPTS)
    with torch.no_grad():
        (nothing,) = find_alphas_for_kl(probe, torch.zeros(1, 24), 0.25, steps=4)
    assert not nothing.reached
    with pytest.raises(ValueError, match="target=0"):
        find_alphas_for_kl(probe, torch.ones(1, 24), 0.0)


def test_top_tokens_come_with_their_context():
    index = small_index()
    coefficients = torch.tensor([[0.1], [0.9], [0.0], [0.5], [0.0], [0.0]])
    found = top_tokens(coefficients, index, 0, context=1)
    assert [one.row for one in found] == [1, 3, 0]
    assert (found[0].sentence, found[0].before, found[0].token, found[0].after) == (0, [0], 1, [2])
    assert found[0].text(Letters()) == "A«B»C"
    assert len(top_tokens(coefficients, index, 0, count=1)) == 1


@pytest.mark.parametrize("make", [llama, gpt2])
def test_projection_is_the_output_embedding_of_what_the_feature_writes(make):
    model = make()
    width = 24 if make is llama else 64
    vector = torch.randn(width)
    name = mlp_site(model, 0)
    with torch.no_grad():
        silent = model.get_submodule(name)(torch.zeros(1, width))
        written = (model.get_submodule(name)(vector[None]) - silent)[0]
        wanted = model.get_output_embeddings()(written)
        norm = model.model.norm.weight if make is llama else model.transformer.ln_f.weight
        normed = model.get_output_embeddings()(written * norm)
    found = vocab_projection(model, 0, vector, top=5)
    assert [token for token, _ in found.raised] == wanted.topk(5).indices.tolist()
    assert [token for token, _ in found.lowered] == (-wanted).topk(5).indices.tolist()
    assert found.raised[0][1] == pytest.approx(float(wanted.max()), rel=1e-4)
    assert vocab_projection(model, 0, vector, top=99, final_norm=True).raised[0][1] == pytest.approx(
        float(normed.max()), rel=1e-4
    )


def test_feature_neurons_are_those_that_are_not_zero():
    assert feature_neurons([0.0, -2.0, 0.0, 1.0]) == [(1, -2.0), (3, 1.0)]


def test_concepts_are_ten_of_twenty_sentences():
    found = concepts()
    assert [len(one.sentences) for one in found] == [20] * 10
    assert all(len(one.words) == 10 or one.name == "weekdays" for one in found)
    every = [text for one in found for text in one.sentences]
    assert len(set(every)) == 200
    assert all(sum(day in text for text in weekday_sentences()) == 6 for day in WEEKDAYS)
