# SPDX-License-Identifier: Apache-2.0
"""A language model of mixture-of-memories layers: the hybrid model, with the load-balancing loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tilewright.nn.hybrid_linear_attention.modeling import CACHE_NAME, HybridForCausalLM
from tilewright.nn.mom.configuration import MomConfig
from tilewright.nn.mom.grouped import XAVIER_GAIN
from tilewright.nn.mom.routing import load_balancing_loss


class MomForCausalLM(HybridForCausalLM):
    """:class:`tilewright.nn.HybridForCausalLM` with mixtures of memories: `loss = next-token loss + scale * balance`.

    Linear layers start Xavier uniform with gain 2^-2.5. ``generate()``, ``save_pretrained`` and packed sequences are
    those of the hybrid model; decoding keeps `[B, M (+ 1), H, K, V]` a layer, whatever the length.
    """

    config_class = MomConfig  # type: ignore[assignment]

    def __init__(self, config: MomConfig) -> None:
        super().__init__(config)
        self._draw_linears()

    @torch.no_grad()
    def _draw_linears(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                if module is self.lm_head and self.config.tie_word_embeddings:
                    continue
                generator = torch.Generator(module.weight.device).manual_seed(getattr(module, "_init_seed", 0))
                nn.init.xavier_uniform_(module.weight, gain=XAVIER_GAIN, generator=generator)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the next token; with labels the loss, to which the balance of all layers' routers is added.

        Args:
            output_router_logits: return each layer's router logits `[B, T, M]` too (`[1, N, M]`, the N real tokens,
                where the batch has padding).
            Others as in :meth:`tilewright.nn.HybridForCausalLM.forward`.

        Returns:
            As there, with ``aux_loss`` (not scaled) and ``router_logits``.
        """
        router_logits: list[Tensor] | None = [] if labels is not None or output_router_logits else None
        out = super().forward(
            input_ids, attention_mask=attention_mask, labels=labels, router_logits=router_logits, **kwargs
        )
        loss, balance = out.loss, None
        if router_logits:
            balance = load_balancing_loss(
                router_logits, self.config.num_memories, self.config.topk, layer_wise=self.config.use_layer_wise_balance
            )
            loss = None if loss is None else loss + self.config.aux_loss_scale * balance
        states: dict[str, Any] = {CACHE_NAME: out.get(CACHE_NAME)}
        if output_router_logits and router_logits:
            states["router_logits"] = tuple(router_logits)
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=balance, logits=out.logits, hidden_states=out.hidden_states, **states
        )


AutoConfig.register(MomConfig.model_type, MomConfig)
AutoModelForCausalLM.register(MomConfig, MomForCausalLM)
