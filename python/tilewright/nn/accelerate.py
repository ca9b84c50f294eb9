# SPDX-License-Identifier: Apache-2.0
"""Linear-attention layers of transformers models on this package's kernels, by one call.

A modelling file of transformers calls its recurrences by name: ``torch_chunk_gated_delta_rule`` for a prompt,
``torch_recurrent_gated_delta_rule`` for a token, and so on, each with a slow form in plain torch. :func:`accelerate`
binds those names to the operators of :mod:`tilewright.ops`, in the namespace where the layers of the given model look
them up, and nowhere else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops

Function = Callable[..., Any]
_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """One name that a model's layers look up, and what it is bound to.

    Attributes:
        where: the module whose namespace is changed, or the layer whose method is.
        name: the function or method.
        operators: what computes it now.
        layers: names of the layers that use it.
    """

    where: str
    name: str
    operators: str
    layers: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.layers[:2]) + (", ..." if len(self.layers) > 2 else "")
        return f"{self.where}.{self.name} -> {self.operators} ({len(self.layers)} layers: {shown})"


class Acceleration:
    """What :func:`accelerate` replaced. ``print`` it for a report; as a context manager it undoes itself at the end.

    Attributes:
        replacements: one for each name that was bound.
    """

    def __init__(self, model: str, found: list[tuple[Replacement, _Site]]) -> None:
        self.replacements = tuple(replacement for replacement, _ in found)
        self._model = model
        self._sites = [site for _, site in found]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that run on the operators."""
        return tuple(dict.fromkeys(layer for r in self.replacements for layer in r.layers))

    def undo(self) -> None:
        """Bind the names to what they were. A second call does nothing; so does one while others still use a name."""
        while self._sites:
            self._sites.pop().release()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self._model}: {len(self.layers)} layers on tilewright's kernels", *map(str, self.replacements)]
        return "\n  ".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Run a model's linear-attention layers on the kernels of :mod:`tilewright.ops`.

    Outputs and gradients stay those of the model, to rounding: the recurrences are computed in float32 (float64 in a
    float64 model) whatever the model's dtype, states are float32. What is replaced:

    ============================================  ==========================================================
    layers of                                     operators
    ============================================  ==========================================================
    Qwen3-Next, Qwen3.5, OLMo hybrid (gated       ``chunk_gated_delta_rule``, ``fused_recurrent_gated_delta_rule``
    delta rule)
    Kimi Linear (delta rule, decay per channel)   ``chunk_kda``, ``fused_recurrent_kda``
    Mamba-2, Bamba, Falcon-H1, Zamba2, Granite,   ``chunk_simple_gla``, ``fused_recurrent_simple_gla``: the state-space
    Nemotron-H                                    dual form is linear attention with q = C, k = B, v = dt x, g = A dt
    MiniMax (lightning attention)                 ``linear_attention`` with a constant decay per head
    ============================================  ==========================================================

    Functions are replaced in the modelling module, so every model of the same classes in this process uses the
    operators until :meth:`Acceleration.undo`. Tensors that are not on the CPU, packed sequences (``cu_seqlens``,
    ``seq_idx``) and ``torch.export`` still go to what was there before.

    Args:
        model: a transformers model, or any module that holds such layers.

    Returns:
        The replacements, to print, to undo, or to use as a context manager.

    Raises:
        TypeError: the argument is no module.
        ValueError: the model has no layer whose functions are known here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, needed a torch.nn.Module")
    users: dict[_Key, list[str]] = {}
    places: dict[_Key, _Place] = {}
    for name, module in model.named_modules():
        for place in _places(module, name):
            places.setdefault(place.key, place)
            users.setdefault(place.key, []).append(name or type(module).__name__)
    if not places:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no layer that calls one of {', '.join(sorted(_FUNCTIONS))} or is "
            f"a {', '.join(sorted(_METHODS))}; there is nothing to replace (a model with softmax attention only needs "
            "tilewright.linearize first)"
        )
    found = []
    for key, place in places.items():
        replacement = Replacement(place.where, place.name, place.operators, tuple(users[key]))
        found.append((replacement, _bind(place)))
    return Acceleration(type(model).__name__, found)


# --- where a layer looks its functions up ---------------------------------------------------------------------------

_Key = tuple[int, str]


@dataclass(frozen=True)
class _Place:
    """A name in a namespace: a module's globals, or an instance's attributes."""

    where: str
    namespace: dict[str, Any]
    name: str
    operators: str
    make: Callable[[Any], Any]  # what was there (_ABSENT: nothing) to what takes its place

    @property
    def key(self) -> _Key:
        return id(self.namespace), self.name


def _places(module: nn.Module, name: str) -> Iterator[_Place]:
    cls = type(module)
    if cls.__name__ in _METHODS:
        operators, method = _METHODS[cls.__name__]
        where = name or cls.__name__
        yield _Place(where, module.__dict__, "forward", operators, lambda _: MethodType(method, module))
    for known, (operators, make) in _FUNCTIONS.items():
        # Early versions 5 keep the function on the layer.
        if callable(module.__dict__.get(known)):
            yield _Place(name or cls.__name__, module.__dict__, known, operators, make)
    for function in _methods(cls):
        for known in set(function.__code__.co_names) & set(_FUNCTIONS):
            if callable(function.__globals__.get(known)):
                operators, make = _FUNCTIONS[known]
                yield _Place(function.__globals__["__name__"], function.__globals__, known, operators, make)


def _methods(cls: type) -> tuple[FunctionType, ...]:
    """The plain functions behind a class's methods, decorators taken off."""
    members = [member for base in cls.__mro__ if base is not nn.Module for member in vars(base).values()]
    functions = [inspect.unwrap(member) for member in members if isinstance(member, FunctionType)]
    return tuple(function for function in functions if isinstance(function, FunctionType))


class _Site:
    """A replaced name, and how many accelerations use it."""

    def __init__(self, place: _Place) -> None:
        self.place, self.users = place, 0
        self.before = place.namespace.get(place.name, _ABSENT)
        self.now = place.make(self.before)
        place.namespace[place.name] = self.now

    def release(self) -> None:
        self.users -= 1
        if self.users:
            return
        del _SITES[self.place.key]
        namespace, name = self.place.namespace, self.place.name
        # Whoever bound the name after us keeps it.
        if namespace.get(name) is not self.now:
            return
        if self.before is _ABSENT:
            del namespace[name]
        else:
            namespace[name] = self.before


_SITES: dict[_Key, _Site] = {}


def _bind(place: _Place) -> _Site:
    site = _SITES.get(place.key)
    if site is None:
        site = _SITES[place.key] = _Site(place)
    site.users += 1
    return site


# --- replacements -----------------------------------------------------------------------------------------------------


def _is_ours(x: Tensor, options: dict[str, Any]) -> bool:
    packed = any(options.get(name) is not None for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx"))
    return x.device.type == "cpu" and not packed and not torch.compiler.is_exporting()


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _delta_rule(operator: Function, original: Function) -> Function:
    """The gated delta rule, decay per head or per channel: q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g a natural log."""

    @functools.wraps(original)
    def replacement(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if rest or not _is_ours(query, options):
            result: tuple[Tensor, Tensor | None] = original(query, key, value, g, beta, *rest, **options)
            return result
        dtype = _work_dtype(query)
        q, k, v, g, beta = (x.to(dtype) for x in (query, key, value, g, beta))
        state = options.get("initial_state")
        out, final = operator(
            q,
            k,
            v,
            g,
            beta,
            initial_state=None if state is None else state.to(dtype),
            output_final_state=options.get("output_final_state", False),
            use_qk_l2norm_in_kernel=options.get("use_qk_l2norm_in_kernel", False),
        )
        return out.to(query.dtype), final

    return replacement


def _chunk_scan(original: Function) -> Function:
    """Mamba-2's scan: S = exp(A dt) S + B (dt x)^T, y = S^T C + D x; states there are `[B, H, V, K]`."""

    @functools.wraps(original)
    def replacement(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if rest or options.get("z") is not None or not _is_ours(hidden_states, options):
            result: Tensor | tuple[Tensor, Tensor] = original(hidden_states, dt, A, B, C, *rest, **options)
            return result
        dtype = _work_dtype(hidden_states)
        dt = _time_step(dt, options.get("dt_bias"), options.get("dt_softplus", False))
        dt = torch.clamp(dt, *options.get("dt_limit", (0.0, float("inf")))).to(dtype)
        x, state, skip = hidden_states.to(dtype), options.get("initial_states"), options.get("D")
        out, final = ops.chunk_simple_gla(
            C.to(dtype),
            B.to(dtype),
            x * dt[..., None],
            A.to(dtype) * dt,
            scale=1.0,
            initial_state=None if state is None else state.transpose(-1, -2).to(dtype),
            output_final_state=options.get("return_final_states", False),
        )
        if skip is not None:
            out = out + skip[:, None] * x
        return out if final is None else (out, final.transpose(-1, -2))

    return replacement


def _state_update(original: Function) -> Function:
    """One token of Mamba-2 for a state `[B, H, V, K]`, changed in place; A, D and dt come expanded over V and K."""

    @functools.wraps(original)
    def replacement(
        state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        names = ("D", "dt_bias", "dt_softplus", "z")
        options = dict(zip(names, rest, strict=False)) | options
        skip, bias, gate = options.get("D"), options.get("dt_bias"), options.get("z")
        one_per_head = _is_expanded(A, 2) and all(_is_expanded(x, 1) for x in (dt, skip, bias) if x is not None)
        if not one_per_head or not _is_ours(hidden_states, options):
            result: Tensor = original(state, hidden_states, dt, A, B, C, **options)
            return result
        dtype = _work_dtype(hidden_states)
        step = _time_step(dt[..., 0], None if bias is None else bias[..., 0], options.get("dt_softplus", False))
        step = step.to(dtype)
        x = hidden_states.to(dtype)
        out, final = ops.fused_recurrent_simple_gla(
            C.to(dtype)[:, None],
            B.to(dtype)[:, None],
            (x * step[..., None])[:, None],
            (A[..., 0, 0].to(dtype) * step)[:, None],
            scale=1.0,
            initial_state=state.transpose(-1, -2).to(dtype),
            output_final_state=True,
        )
        assert final is not None
        state.copy_(final.transpose(-1, -2))
        out = out[:, 0] if skip is None else out[:, 0] + skip * x
        return (out if gate is None else out * F.silu(gate)).to(hidden_states.dtype)

    return replacement


def _is_expanded(x: Tensor, dimensions: int) -> bool:
    """Whether the last dimensions repeat one value."""
    return all(x.stride(d) == 0 or x.shape[d] == 1 for d in range(-dimensions, 0))


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    # In the model's dtype, as there: a time step rounded otherwise would be another model.
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _minimax_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention of MiniMax: S = exp(-s_h) S + k v^T, o = S^T q, SiLU on q, k and v, no scale."""
    cache = options.get("past_key_values") if cache is None else cache
    state = None if cache is None else cache.get_linear_cache(self.layer_idx)
    packed = options.get("cu_seq_lens_q") is not None
    if packed or hidden_states.device.type != "cpu" or torch.compiler.is_exporting():
        name = "cache" if "cache" in inspect.signature(type(self).forward).parameters else "past_key_values"
        options[name] = cache
        result: tuple[Tensor, Tensor | None] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, **options
        )
        return result
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    dtype = _work_dtype(qkv)
    q, k, v = qkv.unflatten(-1, (self.num_attention_heads, 3, self.head_dim)).to(dtype).unbind(-2)
    # An empty list stands for a layer that the cache has skipped.
    initial = state.to(dtype) if isinstance(state, Tensor) else None
    out, final = ops.linear_attention(
        q, k, v, g=-self.slope_rate.flatten().to(dtype), scale=1.0, initial_state=initial, output_final_state=True
    )
    out = self.norm(out.flatten(-2).to(hidden_states.dtype))
    out = self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out)
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, final)
    return out, final


def _operator(name: str) -> tuple[str, Callable[[Any], Any]]:
    return f"tilewright.ops.{name}", functools.partial(_delta_rule, getattr(ops, name))


# Names of functions in transformers 5, wherever a layer finds them.
_FUNCTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "torch_chunk_gated_delta_rule": _operator("chunk_gated_delta_rule"),
    "torch_recurrent_gated_delta_rule": _operator("fused_recurrent_gated_delta_rule"),
    "chunk_gated_delta_rule": _operator("chunk_gated_delta_rule"),
    "recurrent_gated_delta_rule": _operator("fused_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": _operator("chunk_kda"),
    "recurrent_kimi_delta_attention": _operator("fused_recurrent_kda"),
    "mamba2_chunk_scan": ("tilewright.ops.chunk_simple_gla", _chunk_scan),
    "mamba2_selective_state_update": ("tilewright.ops.fused_recurrent_simple_gla", _state_update),
}
# Classes whose recurrence stands inside the forward method.
_METHODS: dict[str, tuple[str, Function]] = {
    "MiniMaxLightningAttention": ("tilewright.ops.linear_attention", _minimax_forward),
}
