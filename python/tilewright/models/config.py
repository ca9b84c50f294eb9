# SPDX-License-Identifier: Apache-2.0
"""The architecture of a Llama-family model: names of transformers, every value checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.models.errors import CheckpointError
from tilewright.models.rope import RopeScaling, rope_frequencies, rope_from_transformers, rope_to_transformers

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPES = ("llama", "mistral", "qwen2", "bitnet")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "bitnet": "BitNetForCausalLM",
}
# What the first BitNet checkpoints (1bitLLM/bitnet_b1_58-large and -3B) call their architecture; their model_type is
# that of Llama.
_FIRST_BITNET = "BitnetForCausalLM"
_HIDDEN_ACTS = {"bitnet": ("silu", "relu2")}
# Upper ends are a factor of several above the largest published Llama-family model; a header beyond
# them is damage, and is refused before anything is allocated from it.
_BOUNDS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 27,
}


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a decoder-only model of the Llama family.

    Names are transformers'. ``qkv_bias``/``output_bias``/``mlp_bias`` say which linears carry a bias;
    ``sliding_window`` is in tokens (None: full attention); ``eos_token_ids`` are all tokens that end a text;
    ``hidden_act`` is that of the gated MLP: "silu", in a BitNet also "relu2", the squared ReLU.

    Raises:
        CheckpointError: a value is of the wrong kind, out of range, or contradicts another.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        require_model_type(self.model_type)
        for name, limit in _BOUNDS.items():
            _require_int(name, getattr(self, name), 1, limit)
        _require_float("rms_norm_eps", self.rms_norm_eps, 0.0, 0.1)
        _require_float("rope_theta", self.rope_theta, 1.0, 1e12)
        if self.rms_norm_eps == 0.0 or self.rope_theta == 1.0:
            raise CheckpointError("config: rms_norm_eps must be above 0 and rope_theta above 1")
        for name in ("tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"config: {name}={getattr(self, name)!r} must be true or false")
        if self.sliding_window is not None:
            _require_int("sliding_window", self.sliding_window, 1, 1 << 27)
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 0, self.vocab_size - 1)
        for token in self.eos_token_ids:
            _require_int("eos_token_ids", token, 0, self.vocab_size - 1)
        acts = _HIDDEN_ACTS.get(self.model_type, ("silu",))
        if self.hidden_act not in acts:
            raise CheckpointError(
                f"config: hidden_act={str(self.hidden_act)[:60]!r} of a {self.model_type} must be {' or '.join(acts)}"
            )
        self._check_heads()

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim={self.head_dim} must be even, rotary positions turn pairs")
        if self.has_sub_norms and self.num_attention_heads * self.head_dim != self.hidden_size:
            raise CheckpointError(
                f"config: num_attention_heads={self.num_attention_heads} times head_dim={self.head_dim} must be "
                f"hidden_size={self.hidden_size} in a bitnet"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise CheckpointError(
                f"config: rope scaling has {len(scaling.factors)} factors, head_dim={self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    @property
    def has_sub_norms(self) -> bool:
        """Whether an RMSNorm also stands before the output and the down projection, as in BitNet b1.58."""
        return self.model_type == "bitnet"

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each rotary pair: float32 [head_dim / 2]."""
        return rope_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def rotation_gain(self) -> float:
        """Factor on cos and sin; differs from 1 only under YaRN."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.rotation_gain

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` restores an equal config."""
        values = dataclasses.asdict(self)
        # Newer than the first files, which older versions of this package must go on to read.
        if self.hidden_act == "silu":
            del values["hidden_act"]
        return values

    @classmethod
    def from_dict(cls, raw: Any) -> LlamaConfig:
        """Strict inverse of :meth:`to_dict`: every field present, none unknown; ``hidden_act`` may be absent."""
        raw = {"hidden_act": "silu", **raw} if isinstance(raw, dict) else raw
        values = _strict_fields(cls, raw, "config")
        if values["rope_scaling"] is not None:
            scaling = _strict_fields(RopeScaling, values["rope_scaling"], "config: rope_scaling")
            values["rope_scaling"] = _build(RopeScaling, scaling | {"factors": _tuple("factors", scaling["factors"])})
        values["eos_token_ids"] = _tuple("eos_token_ids", values["eos_token_ids"])
        config: LlamaConfig = _build(cls, values)
        return config

    @classmethod
    def from_transformers(cls, raw: Any) -> LlamaConfig:
        """From the dictionary of a transformers ``config.json``."""
        return _from_transformers(raw)

    def to_transformers(self) -> dict[str, Any]:
        """A ``config.json`` dictionary that transformers 5 reads back to the same architecture."""
        values = {name: getattr(self, name) for name in _BOUNDS} | {
            "architectures": [_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "hidden_act": self.hidden_act,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope_to_transformers(self.rope_theta, self.rope_scaling),
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type == "llama":
            values |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        elif self.model_type == "bitnet":
            del values["head_dim"]
            values["attention_bias"] = self.qkv_bias
        else:
            values["sliding_window"] = self.sliding_window
        if self.model_type == "qwen2":
            values |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        return values


def require_model_type(model_type: Any) -> None:
    """Raise a CheckpointError that lists the supported architectures, if this is none of them."""
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config: architecture {str(model_type)[:60]!r} is not supported; supported are the Llama family: "
            f"{', '.join(MODEL_TYPES)} (SmolLM2, TinyLlama, Llama 1-3, Mistral 7B, Qwen2, Qwen2.5 and BitNet b1.58 are "
            "of these types)"
        )


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"config: {name}={str(value)[:60]} must be a whole number in {low}..{high}")


def _require_float(name: str, value: Any, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise CheckpointError(f"config: {name}={str(value)[:60]} must be a number in {low}..{high}")


def _strict_fields(cls: type, raw: Any, where: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: a dictionary is needed, got {type(raw).__name__}")
    if unknown := sorted(map(str, raw.keys() - names)):
        raise CheckpointError(
            f"{where}: unknown key {unknown[0][:60]!r}; this version knows {', '.join(sorted(names))}"
        )
    if missing := sorted(names - raw.keys()):
        raise CheckpointError(f"{where}: key {missing[0]!r} is missing")
    return dict(raw)


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"config: {name} must be a list, got {type(value).__name__}")
    return tuple(value)


def _build(cls: type, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except (TypeError, OverflowError) as wrong:
        raise CheckpointError(f"config: {cls.__name__} has a value of the wrong kind: {wrong}") from None


def _need(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(f"config.json: key {name!r} is missing")
    return raw[name]


def _check_neutral(raw: dict[str, Any], model_type: str) -> None:
    """Refuse settings that change the forward pass in a way that no kernel here follows."""
    neutral = {
        "hidden_act": ("silu", "swish", *_HIDDEN_ACTS.get(model_type, ())),
        "partial_rotary_factor": (1, 1.0),
        "pretraining_tp": (1,),
        "logit_scale": (1, 1.0),
        "final_logit_softcapping": (),
        "attn_logit_softcapping": (),
        "num_experts": (0,),
        "num_local_experts": (0,),
    }
    for name, allowed in neutral.items():
        value = raw.get(name)
        # pretraining_tp only changes the order of summation, not the function
        if value is not None and value not in allowed and name != "pretraining_tp":
            need = f"needs {allowed[0]!r}" if allowed else "needs it absent"
            raise CheckpointError(f"config.json: {name}={str(value)[:60]!r} is not supported; tilewright {need}")
    kinds = set(raw["layer_types"]) if isinstance(raw.get("layer_types"), list) else set()
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json: layer_types mixes {', '.join(sorted(map(str, kinds)))}; one kind of attention for all "
            "layers is needed"
        )


def _check_misspelt(raw: dict[str, Any]) -> None:
    """A damaged key must not fall back to a default silently: rope_thetb is refused, a new key of others is not."""
    known = set(_BOUNDS) | {"rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias"}
    known |= {"mlp_bias", "sliding_window", "use_sliding_window", "bos_token_id", "eos_token_id", "hidden_act"}
    absent = known - raw.keys()
    for key in raw:
        if key in ("pad_token_id", "sep_token_id", "hidden_size_per_layer_input"):
            continue
        if key not in known and (near := difflib.get_close_matches(str(key), absent, n=1, cutoff=0.85)):
            raise CheckpointError(f"config.json: unknown key {str(key)[:60]!r}; did you mean {near[0]!r}?")


def _sliding_window(raw: dict[str, Any], model_type: str) -> int | None:
    """The window of every layer; Qwen2 switches it on by flag, from layer max_window_layers upwards."""
    window: int | None = raw.get("sliding_window")
    if model_type in ("llama", "bitnet") or (model_type == "qwen2" and not raw.get("use_sliding_window", False)):
        return None
    if model_type == "mistral":
        return window
    first, layers = raw.get("max_window_layers", 28), _need(raw, "num_hidden_layers")
    if first == 0 or "sliding_attention" in (raw.get("layer_types") or []):
        return window
    if first < layers:
        raise CheckpointError(
            f"config.json: max_window_layers={first} of {layers} layers mixes full and sliding attention; "
            "one kind for all layers is needed"
        )
    return None


def _from_transformers(raw: Any) -> LlamaConfig:
    if not isinstance(raw, dict):
        raise CheckpointError(f"config.json: a JSON object is needed, got {type(raw).__name__}")
    model_type = "bitnet" if is_first_bitnet(raw) else raw.get("model_type")
    require_model_type(model_type)
    _check_misspelt(raw)
    try:
        _check_neutral(raw, str(model_type))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"config.json: rope_scaling must be an object, got {type(rope).__name__}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                "config.json: partial_rotary_factor must be 1; partial rotary positions are not supported"
            )
        heads, hidden = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
        _require_int("num_attention_heads", heads, 1, _BOUNDS["num_attention_heads"])
        _require_int("hidden_size", hidden, 1, _BOUNDS["hidden_size"])
        if raw.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size={hidden} must be a multiple of num_attention_heads={heads}"
            )
        positions = _need(raw, "max_position_embeddings")
        _require_int("max_position_embeddings", positions, 1, _BOUNDS["max_position_embeddings"])
        bias = raw.get("attention_bias", False) or False
        eos = raw.get("eos_token_id")
        return LlamaConfig(
            model_type=str(model_type),
            vocab_size=_need(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_need(raw, "intermediate_size"),
            num_hidden_layers=_need(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
            head_dim=hidden // heads if raw.get("head_dim") is None else raw["head_dim"],
            max_position_embeddings=positions,
            rms_norm_eps=_need(raw, "rms_norm_eps"),
            rope_theta=_theta(raw, rope),
            rope_scaling=rope_from_transformers(rope, positions),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=True if model_type == "qwen2" else bias,
            output_bias=bias if model_type in ("llama", "bitnet") else False,
            mlp_bias=raw.get("mlp_bias", False) if model_type == "llama" else False,
            sliding_window=_sliding_window(raw, str(model_type)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_token_id=None if raw.get("pad_token_id") == -1 else raw.get("pad_token_id"),
            hidden_act="relu2" if raw.get("hidden_act") == "relu2" else "silu",
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError) as wrong:
        raise CheckpointError(f"config.json: a value is of the wrong kind: {wrong}") from None


def is_first_bitnet(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the first BitNet b1.58 checkpoints, whose code came beside them."""
    return raw.get("architectures") == [_FIRST_BITNET]


def _theta(raw: dict[str, Any], rope: dict[str, Any]) -> Any:
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    return 10000.0 if theta is None else theta
