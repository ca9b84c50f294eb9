# SPDX-License-Identifier: Apache-2.0
"""tilewright.capture: names, streaming, padding, and that a hooked model stays the bare model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.capture import Site, intervened, observe, resolve, tapped
from tilewright.reducers import AbsMax, Covariance, MeanAbs, Moments, Reservoir


def tiny_llama(dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def look(*_):
    return None


def tokens(batch=2, length=9, seed=1):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_glob_star_stays_within_one_component(llama):
    assert [p.name for p in resolve(llama, "model.layers.*.mlp")] == [f"model.layers.{i}.mlp@output" for i in range(3)]
    assert [p.name for p in resolve(llama, "model.layers.*")] == [f"model.layers.{i}@output" for i in range(3)]
    assert len(resolve(llama, "**.down_proj@input")) == 3
    assert len(resolve(llama, "model.layers.?.self_attn.?_proj")) == 12


def test_regular_expression_must_match_the_whole_name(llama):
    assert len(resolve(llama, r"re:model\.layers\.[02]\.mlp")) == 2
    with pytest.raises(ValueError, match="matches no module"):
        resolve(llama, r"re:layers\.0")


def test_empty_pattern_is_the_model_itself(llama):
    assert [p.module_name for p in resolve(llama, "")] == [""]


@pytest.mark.parametrize("wrong", ["model.layers.*.mlp.down_porj", "model.layer.0.mlp", "re:model.layers.0.mpl"])
def test_misspelt_name_lists_near_names(llama, wrong):
    with pytest.raises(ValueError, match=r"near names: .*mlp"):
        resolve(llama, wrong)


def test_name_like_nothing_still_lists_what_exists(llama):
    with pytest.raises(ValueError, match="it has model"):
        resolve(llama, "zzzzzz")


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="side='outptu'"):
        Site.parse("lm_head@outptu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_observed_model_are_bitwise_those_of_the_bare_model(dtype):
    model = tiny_llama(dtype)
    ids = tokens()
    with torch.no_grad():
        bare = model(ids).logits
        with tapped(model, {"model.layers.*.mlp.*@input": look, "**.k_proj": lambda _, x: x.mul(2)}):
            hooked = model(ids).logits
        after = model(ids).logits
    assert torch.equal(bare, hooked)
    assert torch.equal(bare, after)


def test_hooks_are_gone_after_an_error(llama):
    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), tapped(llama, {"model.layers.*": fail}):
        llama(tokens())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in llama.modules())


def test_input_and_output_are_those_of_the_module(llama):
    seen = {}
    with (
        torch.no_grad(),
        tapped(
            llama,
            {"model.layers.1.mlp.down_proj@input": seen.__setitem__, "model.layers.1.mlp.down_proj": seen.__setitem__},
        ),
    ):
        llama(tokens())
    x, y = seen["model.layers.1.mlp.down_proj@input"], seen["model.layers.1.mlp.down_proj@output"]
    with torch.no_grad():
        assert torch.equal(llama.model.layers[1].mlp.down_proj(x), y)


def test_keyword_called_module_gives_its_first_tensor(llama):
    seen = {}
    with (
        torch.no_grad(),
        tapped(
            llama,
            {"model.layers.0.self_attn@input": seen.__setitem__, "model.layers.0.input_layernorm": seen.__setitem__},
        ),
    ):
        llama(tokens())
    assert torch.equal(seen["model.layers.0.self_attn@input"], seen["model.layers.0.input_layernorm@output"])


def test_transform_is_applied_on_the_fly(llama):
    heads = Site("model.layers.0.self_attn.k_proj", transform=lambda k: k.unflatten(-1, (2, 8)).norm(dim=-1))
    got = observe(llama, [tokens()], {heads: AbsMax})["model.layers.0.self_attn.k_proj@output"]
    seen = {}
    with torch.no_grad(), tapped(llama, {"model.layers.0.self_attn.k_proj": seen.__setitem__}):
        llama(tokens())
    k = seen["model.layers.0.self_attn.k_proj@output"].unflatten(-1, (2, 8)).norm(dim=-1)
    assert torch.equal(got, k.flatten(0, 1).amax(0))


def test_padding_reaches_no_reducer(llama):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    site = "model.layers.2.mlp.down_proj@input"
    collect = lambda: Reservoir(100)  # noqa: E731
    got = observe(llama, [{"input_ids": ids, "attention_mask": mask}], {site: collect})[site]
    changed = ids.clone()
    changed[0, 5:] = 3
    again = observe(llama, [{"input_ids": changed, "attention_mask": mask}], {site: collect})[site]
    assert got.shape == (14, 48)
    assert torch.equal(got, again)


def test_fully_masked_data_is_an_error(llama):
    batch = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    with pytest.raises(ValueError, match="has seen no activation"):
        observe(llama, [batch], {"model.layers.0.mlp.down_proj@input": AbsMax})


def test_result_does_not_depend_on_the_batching():
    net = nn.Identity()
    data = torch.randn(37, 5, generator=torch.Generator().manual_seed(2))
    whole = observe(net, [data], {"": AbsMax})["@output"]
    parts = observe(net, list(data.split([1, 7, 0, 29])), {"": AbsMax})["@output"]
    assert torch.equal(whole, parts)


def test_batches_are_streamed_one_at_a_time():
    alive = []

    def stream():
        for i in range(4):
            assert len(alive) == i
            yield torch.full((3, 2), float(i))

    class Count(AbsMax):
        def update(self, x):
            alive.append(1)
            super().update(x)

    assert observe(nn.Identity(), stream(), {"": Count})["@output"].tolist() == [3.0, 3.0]


def test_empty_batches_are_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        observe(nn.Identity(), [], {"": AbsMax})


def test_point_matched_by_two_sites_is_an_error(llama):
    with pytest.raises(ValueError, match="matched by two sites"):
        observe(llama, [tokens()], {"lm_head": AbsMax, "lm_*": MeanAbs})


def test_flattened_tokens_are_masked_too():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, input_ids, attention_mask):  # noqa: ARG002
            return self.inner(input_ids.reshape(-1, 1).float())

    batch = {"input_ids": torch.tensor([[1, 2, 9], [3, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert observe(Flat(), [batch], {"inner": AbsMax})["inner@output"].item() == 3


def test_activation_without_token_dimensions_is_an_error(llama):
    site = Site("lm_head", transform=lambda y: y[0, 0])
    with pytest.raises(ValueError, match="does not start with the batch's tokens"):
        observe(llama, [tokens()], {site: AbsMax})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reducer", [AbsMax, MeanAbs, Moments, Covariance, lambda: Reservoir(9)])
def test_damaged_activations_name_the_point(bad, reducer):
    net = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match=r"0@output: activations hold NaN or infinite"):
        observe(net, [torch.tensor([[1.0, bad]])], {"0": reducer})


def test_bf16_activations_give_float32_statistics():
    model = tiny_llama(torch.bfloat16)
    result = observe(model, [tokens()], {"model.layers.*.mlp.down_proj@input": AbsMax})
    assert len(result) == 3
    assert all(v.dtype == torch.float32 for v in result.values())


def test_intervention_replaces_and_composes(llama):
    ids = tokens()
    with torch.no_grad():
        with intervened(llama, {"model.layers.*.mlp": torch.zeros_like, "model.layers.*.self_attn": torch.zeros_like}):
            got = llama(ids).logits
        expected = llama.lm_head(llama.model.norm(llama.model.embed_tokens(ids)))
    assert torch.equal(got, expected)


def test_intervention_on_an_input_reaches_the_module(llama):
    seen = {}
    with (
        torch.no_grad(),
        intervened(llama, {"model.layers.0.mlp.down_proj@input": lambda x: x * 0}),
        tapped(llama, {"model.layers.0.mlp": seen.__setitem__}),
    ):
        llama(tokens())
    assert not seen["model.layers.0.mlp@output"].any()


def test_intervention_that_changes_the_shape_is_refused(llama):
    with (
        pytest.raises(ValueError, match=r"lm_head@input: the map returned"),
        intervened(llama, {"lm_head@input": lambda x: x[..., :3]}),
    ):
        llama(tokens())


def test_module_output_without_a_tensor_is_a_clear_error():
    class Words(nn.Module):
        def forward(self, _):
            return "text"

    with pytest.raises(TypeError, match="is a str, not a tensor"):
        observe(nn.Sequential(Words()), [torch.ones(1, 2)], {"0": AbsMax})
