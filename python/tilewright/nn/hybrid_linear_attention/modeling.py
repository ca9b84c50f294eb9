# SPDX-License-Identifier: Apache-2.0
"""A decoder language model whose layers may each have another token mixer (arXiv 2507.06457), for transformers."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tilewright.models.hf_names import cache_name
from tilewright.nn import mixers
from tilewright.nn.cache import MixerCache
from tilewright.nn.hgrn.gate import LowerBounds
from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig
from tilewright.nn.mixer import Mixer, current_columns, default_positions
from tilewright.nn.norms import RMSNorm

CACHE_NAME = cache_name()


class SwiGLU(nn.Module):
    """``W_down (SiLU(W_gate x) o W_up x)`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class HybridBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer_name, options = config.layer_specs[layer_idx]
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        place = {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "layer_idx": layer_idx,
            "num_layers": config.num_hidden_layers,
        }
        self.mixer = mixers.build(self.mixer_name, **{**place, **options})
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """[B, T, D] to [B, T, D]; options go to the mixer."""
        mixed, _, _ = self.mixer(self.mixer_norm(hidden_states), **options)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class HybridPreTrainedModel(PreTrainedModel):
    """Initial weights, and what transformers asks of a model's class.

    Every parameter is drawn from a generator of its own, seeded by one number of torch's global generator and by the
    parameter's name: models of one seed that differ in some mixers agree in all that they share.
    """

    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    def _name_modules(self, seed: int) -> None:
        for name, module in self.named_modules():
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            module._init_seed = int.from_bytes(key[:8], "little") >> 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        if not own or any(p.is_meta for p in own.values()):
            return
        generator = None  # for modules that came later, such as resized embeddings: torch's own
        if isinstance(seed := getattr(module, "_init_seed", None), int):
            generator = torch.Generator(next(iter(own.values())).device).manual_seed(seed)
        # Parameters that came from a checkpoint keep their values, whatever a mixer's own method draws.
        loaded = {n: p.detach().clone() for n, p in own.items() if getattr(p, "_is_hf_initialized", False)}
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            seeded = "generator" in inspect.signature(reset).parameters
            reset(generator=generator) if seeded else reset()
        for name, value in loaded.items():
            own[name].copy_(value)


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        seed = int(torch.randint(2**62, (), device="cpu"))
        with torch.random.fork_rng(devices=[]):  # whatever the blocks draw on the way, the caller's stream stays
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(HybridBlock(config, index) for index in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lower_bounds = _lower_bounds(self.layers)
        self.gradient_checkpointing = False
        self._name_modules(seed)
        self.seed = seed
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cache: MixerCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids [B, T] (or embeddings [B, T, D]) to hidden states [B, T, D].

        attention_mask: [B, past + T], 0 at padding. cu_seqlens: int [N + 1], packed sequences (B = 1).
        past_key_values, cache: two names of one argument, a :class:`tilewright.nn.MixerCache`.

        Raises:
            ValueError: both or none of ids and embeddings are given, or the cache is of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("HybridModel: needed one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None and cu_seqlens is not None:
            use_cache = False  # packed sequences are for training and scoring; mixers refuse a cache with them
        states = self._cache(past_key_values if cache is None else cache, use_cache)
        seen = 0 if states is None else states.get_seq_length()
        if position_ids is None:
            position_ids = _positions(x, attention_mask, seen, cu_seqlens)
        current = current_columns(attention_mask, x.shape[1])
        bounds = {key: module() for key, module in self.lower_bounds.items()}
        hidden: list[Tensor] = []
        for index, block in enumerate(self.layers):
            hidden.append(x)
            options: dict[str, Any] = {}
            if index and (key := _bound_name(block)) in bounds:
                options["lower_bound"] = bounds[key][index]
            # A mixer with a state asks about the present tokens alone, so that it need not look at all the past.
            unpadded = current is None and isinstance(block.mixer, Mixer)
            x = block(
                x,
                attention_mask=None if unpadded else attention_mask,
                past_key_values=states,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
                **options,
                **kwargs,
            )
        x = self.norm(x)
        wanted = (*hidden, x) if output_hidden_states or self.config.output_hidden_states else None
        named: dict[str, Any] = {CACHE_NAME: states}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=wanted, **named)

    def _cache(self, given: Any, use_cache: bool | None) -> MixerCache | None:
        if given is not None and not isinstance(given, MixerCache):
            raise ValueError(
                f"HybridModel: the cache is a {type(given).__name__}; a tilewright.nn.MixerCache is needed, "
                "which holds recurrent states as well as keys and values"
            )
        use = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        return MixerCache() if given is None and use else given


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """:class:`HybridModel` with an output head: training loss, ``generate()``, ``save_pretrained``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        with torch.random.fork_rng(devices=[]):
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._name_modules(self.model.seed)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: MixerCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where there are labels.

        Args:
            labels: int64 [B, T], the inputs themselves; -100 where nothing is asked. They are shifted here, and the
                first token of a packed sequence is not asked of the one before it.
            logits_to_keep: only the last so many positions, or these indices; 0: all.
            Others as in :meth:`HybridModel.forward`. ``num_items_in_batch`` divides the summed loss in place of the
            number of labels (gradient accumulation).
        """
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        x = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)
        loss = None if labels is None else next_token_loss(logits, labels, cu_seqlens, items)
        states: dict[str, Any] = {CACHE_NAME: outputs.get(CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **states)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """``generate()`` starts with an empty :class:`tilewright.nn.MixerCache`."""
        del args, kwargs
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"HybridForCausalLM: cache_implementation = {generation_config.cache_implementation!r}; "
                "leave it out, the model brings a tilewright.nn.MixerCache"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = MixerCache()


def next_token_loss(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of each token given those before it, in float32 (float64 for float64).

    Args:
        logits: [B, T, V].
        labels: int64 [B, T]; -100 is not asked.
        cu_seqlens: boundaries of packed sequences: their first tokens are not asked.
        num_items: divide the sum by this instead of by the number of asked tokens.

    Raises:
        ValueError: logits and labels do not have one length.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"next_token_loss: logits are {list(logits.shape)}, labels {list(labels.shape)}; needed [B, T, V] and "
            "[B, T] (labels with logits_to_keep cannot be)"
        )
    if cu_seqlens is not None:
        inner = cu_seqlens[cu_seqlens < labels.shape[1]].to(torch.int64)
        labels = labels.index_fill(1, inner, -100)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores, asked = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if num_items is None:
        return F.cross_entropy(scores, asked, ignore_index=-100)
    return F.cross_entropy(scores, asked, ignore_index=-100, reduction="sum") / num_items


def _bound_name(block: Any) -> str:
    return f"{block.mixer_name}_{getattr(block.mixer, 'lower_bound_size', None)}"


def _lower_bounds(layers: nn.ModuleList) -> nn.ModuleDict:
    """A table over all layers for each kind of mixer that has bounded forget gates."""
    blocks: list[Any] = list(layers)
    sizes = {_bound_name(b): b.mixer.lower_bound_size for b in blocks if getattr(b.mixer, "lower_bound_size", None)}
    return nn.ModuleDict({name: LowerBounds(len(layers), size) for name, size in sizes.items()})


def _positions(x: Tensor, attention_mask: Tensor | None, seen: int, cu_seqlens: Tensor | None) -> Tensor:
    """Real tokens counted from 0 in each row; columns where there is no mask."""
    if attention_mask is None or attention_mask.shape[1] != seen + x.shape[1]:
        return default_positions(x, seen, cu_seqlens)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
