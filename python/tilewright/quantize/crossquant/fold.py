# SPDX-License-Identifier: Apache-2.0
"""Which layer can take the division by u: producers and consumers of Llama-, OPT- and GPT-2-like graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import resolve


@dataclass(frozen=True)
class Fold:
    """Linears that share an input, and what makes that input; ``*`` in names is the same layer index in all.

    producer: a norm or linear whose output goes to the consumers alone, directly or through functions f with
        f(a x) = a f(x) for a > 0 (attention over values, products with a gate, ReLU); None: u is multiplied online.
    repeat: the consumers' input repeats each of the producer's heads so many times (grouped queries).
    head_dim: size of those heads. part: which third of a fused query-key-value producer; None: all of it.
    """

    producer: str | None
    consumers: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 0
    part: int | None = None

    def shared(self, values: Tensor) -> Tensor:
        """Maxima per input column [I] to one per producer output."""
        if self.repeat == 1:
            return values
        return values.view(-1, self.repeat, self.head_dim).amax(1).flatten()

    def expanded(self, values: Tensor) -> Tensor:
        """One value per producer output to one per input column: the inverse of :meth:`shared`."""
        if self.repeat == 1:
            return values
        return values.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).flatten()


def folds_of(model: nn.Module) -> list[Fold]:
    """The rules of a transformers model's family; none for a family that is not known (everything is online then)."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if kind in ("llama", "mistral", "qwen2"):
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return _llama("**layers.*.", heads // kv, size)
    if kind == "opt" and config.do_layer_norm_before:
        return _opt("**layers.*.", relu=config.activation_function == "relu")
    if kind == "gpt2":
        return _gpt2("**h.*.")
    return []


def _llama(at: str, repeat: int, head_dim: int) -> list[Fold]:
    attention = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
    return [
        Fold(f"{at}input_layernorm", attention),
        Fold(f"{at}self_attn.v_proj", (f"{at}self_attn.o_proj",), repeat, head_dim),
        Fold(f"{at}post_attention_layernorm", (f"{at}mlp.gate_proj", f"{at}mlp.up_proj")),
        Fold(f"{at}mlp.up_proj", (f"{at}mlp.down_proj",)),
    ]


def _opt(at: str, relu: bool) -> list[Fold]:
    attention = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
    return [
        Fold(f"{at}self_attn_layer_norm", attention),
        Fold(f"{at}self_attn.v_proj", (f"{at}self_attn.out_proj",)),
        Fold(f"{at}final_layer_norm", (f"{at}fc1",)),
        Fold(f"{at}fc1" if relu else None, (f"{at}fc2",)),
    ]


def _gpt2(at: str) -> list[Fold]:
    return [
        Fold(f"{at}ln_1", (f"{at}attn.c_attn",)),
        Fold(f"{at}attn.c_attn", (f"{at}attn.c_proj",), part=2),
        Fold(f"{at}ln_2", (f"{at}mlp.c_fc",)),
        Fold(None, (f"{at}mlp.c_proj",)),
    ]


@dataclass
class Group:
    """One rule in one layer, with names resolved: what shares a u."""

    rule: Fold
    producer: str | None
    consumers: tuple[str, ...]


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or transformers' transposed one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linears_of(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Names of all linears but those whose last component is in ``skip``.

    Raises:
        ValueError: there is none.
    """
    names = [n for n, m in model.named_modules() if is_linear(m) and n.rpartition(".")[2] not in skip]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize outside skip={tuple(skip)!r}")
    return names


def groups_of(model: nn.Module, rules: Sequence[Fold], skip: Sequence[str] = ()) -> list[Group]:
    """Every linear once: in the group of the rule that names it, or alone. Order: rules, then the rest.

    Raises:
        ValueError: a rule matches nothing, or different numbers of modules, or two rules name one linear.
    """
    left = dict.fromkeys(linears_of(model, skip))
    groups: list[Group] = []
    for rule in rules:
        consumers = [[p.module_name for p in resolve(model, pattern)] for pattern in rule.consumers]
        producers = [p.module_name for p in resolve(model, rule.producer)] if rule.producer else None
        counts = {len(names) for names in consumers} | ({len(producers)} if producers else set())
        if len(counts) != 1:
            raise ValueError(f"{rule}: its names match different numbers of modules; one of each a layer is needed")
        for i, names in enumerate(zip(*consumers, strict=True)):
            for name in names:
                if name not in left:
                    raise ValueError(f"{name} is named by two rules, is skipped, or is no linear layer")
                del left[name]
            groups.append(Group(rule, producers[i] if producers else None, names))
    groups += [Group(Fold(None, (name,)), None, (name,)) for name in left]
    return groups


def producer_rows(module: nn.Module, rule: Fold) -> slice | None:
    """The outputs of a producer that a rule is about."""
    if rule.part is None:
        return None
    bias = module.bias
    assert isinstance(bias, torch.Tensor)
    third = len(bias) // 3
    return slice(rule.part * third, (rule.part + 1) * third)
