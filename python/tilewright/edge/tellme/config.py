# SPDX-License-Identifier: Apache-2.0
"""Cycles, external memory traffic, memories and logic of the accelerator for a model (arXiv 2510.15926).

Numbers that come from counting are methods; numbers that were fitted to published figures are the fields of
:class:`Calibration`, each with what it was fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tilewright.edge.contract.stream import BEAT_BITS
from tilewright.edge.contract.weights import Tiling

URAM_BITS, URAM_WORDS = 72, 4096
Packing = Literal["beats", "dense", "trits"]


@dataclass(frozen=True)
class Shape:
    """A decoder-only model. ``head_bytes`` is what the host reads for the logits of one token."""

    name: str
    d_model: int
    d_ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    norms: int = 4
    """RMS norms a layer: 2 for Llama, 4 with BitNet's in front of o and down."""

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices."""
        d, f = self.d_model, self.d_ffn
        return {
            "q": (d, self.width), "k": (d, self.kv_width), "v": (d, self.kv_width), "o": (self.width, d),
            "gate": (d, f), "up": (d, f), "down": (f, d),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def head_bytes(self) -> int:
        return self.vocab * self.d_model * 2


@dataclass(frozen=True)
class Calibration:
    """Parameters that no counting gives. Defaults reproduce the paper's KV260 figures together."""

    bw_weight: float = 9.5e9
    """Bytes a second of the three weight ports at 250 MHz: 79 % of their 12 GB/s. Fitted to 25 tok/s with the next."""
    bw_kv: float = 8.0e9
    """Bytes a second of the cache's ports at 250 MHz. Assumed; 1.2 ms of 40 at 64 tokens of context."""
    head_bandwidth: float = 6.14e9
    """Bytes a second at which the host reads the float16 head; 16 ms at 0.73B. Fitted to 25 tok/s with the first."""
    eta: float = 0.36
    """Share of the table-lookup rate that is reached. Fitted to the TTFT of 64 and 128 tokens; nothing explains it."""
    key_cycles: float = 862.0
    """Cycles of prefill attention for one key and one block of queries. Fitted to the same two."""


OURS = Calibration(eta=1.0, key_cycles=0.0)
"""The same memory and host as the paper's; cycles as the schedules count them, which RTL must confirm."""


@dataclass(frozen=True)
class Resources:
    """Lookup tables, DSPs, block RAMs (36 Kb) and UltraRAMs."""

    lut: float
    dsp: float
    bram: float
    uram: float

    def fits(self, budget: Resources) -> bool:
        return (
            self.lut <= budget.lut and self.dsp <= budget.dsp and self.bram <= budget.bram and self.uram <= budget.uram
        )


PAPER_BUDGET = Resources(98303, 610, 98.5, 60)
"""What the paper's whole accelerator takes of the XCK26."""
XCK26 = Resources(117120, 1248, 144, 64)


@dataclass(frozen=True)
class TellmeConfig:
    """A build of the accelerator running a model.

    Attributes:
        f_mhz: clock. fill: cycles between blocks to write tables (27 one entry a cycle, 0 with a second set).
        fused: q, k, v in one sweep and gate, up in one, so that they share tables.
        overlap: weights come in while others are used, in pieces that fit half of the buffer.
        packing: "beats" as the paper (5 vectors of 140 bits in 768), "dense" without gaps, "trits" 5 weights a byte.
        bram: block RAMs, not modelled beyond the paper's count plus one row of sums for each query beyond 4.
    """

    shape: Shape
    tiling: Tiling = field(default_factory=Tiling)
    calibration: Calibration = field(default_factory=Calibration)
    f_mhz: float = 250.0
    fill: int = 0
    fused: bool = False
    overlap: bool = False
    packing: Packing = "beats"
    beat_bits: int = BEAT_BITS

    def __post_init__(self) -> None:
        if self.tiling.q % 2:
            raise ValueError(f"TellmeConfig: q = {self.tiling.q}, needed an even number: a bank has two ports")
        if self.f_mhz <= 0:
            raise ValueError(f"TellmeConfig: f_mhz = {self.f_mhz}, needed a positive clock")

    # Memory

    @property
    def cascade(self) -> int:
        """UltraRAMs side by side for a vector."""
        return -(-self.tiling.vector_bits // URAM_BITS)

    def sweeps(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of what is computed in one sweep; fused ones share the input."""
        l = self.shape.linears
        if not self.fused:
            return list(l.values())
        qkv = (self.shape.d_model, l["q"][1] + l["k"][1] + l["v"][1])
        return [qkv, l["o"], (self.shape.d_model, 2 * self.shape.d_ffn), l["down"]]

    def buffer_words(self) -> int:
        """Words of a bank that the largest matrix needs (without overlap all of it is in the buffer)."""
        t = self.tiling
        return max(t.blocks(i) * t.padded_outputs(o) for i, o in self.shape.linears.values()) // (t.q // 2)

    def uram(self) -> int:
        """UltraRAMs of the weight buffer: with overlap two halves of one URAM's depth each."""
        deep = 2 if self.overlap else -(-self.buffer_words() // URAM_WORDS)
        return deep * self.cascade * self.tiling.q // 2

    def weight_bytes(self) -> float:
        """Bytes of all layers' weights in external memory."""
        t = self.tiling
        vectors = sum(t.blocks(i) * t.padded_outputs(o) for i, o in self.shape.linears.values()) * self.shape.layers
        if self.packing == "beats":
            return vectors / ((self.beat_bits - 16) // t.vector_bits) * self.beat_bits / 8
        return vectors * (t.vector_bits / 8 if self.packing == "dense" else t.block / 5)

    def kv_bytes(self, context: int) -> float:
        """Bytes of cache that a decoded token reads."""
        return 2.0 * context * self.shape.kv_width * 2 * self.shape.layers

    def ddr_bytes(self, context: int) -> float:
        """Bytes that a decoded token reads from external memory but for the head."""
        return self.weight_bytes() + self.kv_bytes(context)

    # Cycles

    def linear_cycles(self, inputs: int, outputs: int) -> int:
        """ceil(n / (T G)) (ceil(k / Q) + F)."""
        return self.tiling.blocks(inputs) * (-(-outputs // self.tiling.q) + self.fill)

    def _pieces(self, inputs: int, outputs: int) -> list[tuple[int, int]]:
        if not self.overlap:
            return [(inputs, outputs)]
        t = self.tiling
        most = URAM_WORDS * (t.q // 2) // t.blocks(inputs) // t.q * t.q
        if most < 1:
            raise ValueError(f"TellmeConfig: half of the buffer holds no column of {inputs} inputs; raise q or t")
        return [(inputs, min(most, outputs - at)) for at in range(0, outputs, most)]

    def layer_cycles(self) -> int:
        """Table-lookup cycles of one token in one layer."""
        return sum(self.linear_cycles(*piece) for sweep in self.sweeps() for piece in self._pieces(*sweep))

    def row_cycles(self) -> int:
        """Cycles of the element-wise units that a lone token waits for, a layer: three passes of a norm, the
        quantizer's, and 60 for divisions and the root."""
        s, lanes = self.shape, self.tiling.lanes
        entering = (s.d_model, s.width, s.d_model, s.d_ffn)
        return sum(4 * -(-n // lanes) + 60 for n in entering)

    def key_cycles(self) -> float:
        """Of one key and one block of queries, a layer: dot products beside sums, `lanes` values a cycle."""
        return self.calibration.key_cycles or -(-self.shape.width // self.tiling.lanes) + self.shape.heads

    def cycles(self, kind: Literal["token", "layer", "prefill_attention"] = "token", tokens: int = 1) -> float:
        """Table-lookup cycles of a token or a layer, or attention cycles of a prompt."""
        if kind == "layer":
            return self.layer_cycles()
        if kind == "token":
            return self.layer_cycles() * self.shape.layers
        if kind == "prefill_attention":
            return self.key_rows(tokens) * self.key_cycles() * self.shape.layers
        raise ValueError(f"cycles: kind = {kind!r}, needed 'token', 'layer' or 'prefill_attention'")

    def key_rows(self, tokens: int) -> int:
        """Key rows that prefill attention reads in a layer: N^2 / (2 P) + N / 2 when P divides N."""
        return sum(range(tokens, 0, -self.tiling.p))

    # Seconds

    @property
    def _hz(self) -> float:
        return self.f_mhz * 1e6

    def _bandwidth(self, at_250: float) -> float:
        return at_250 * min(self.f_mhz / 250.0, 1.0)

    def load_seconds(self) -> float:
        return self.weight_bytes() / self._bandwidth(self.calibration.bw_weight)

    def head_seconds(self) -> float:
        return self.shape.head_bytes / self.calibration.head_bandwidth

    def linear_seconds(self) -> float:
        """Table look-up of one token."""
        return self.cycles("token") / self.calibration.eta / self._hz

    def decode_seconds(self, context: int = 64) -> dict[str, float]:
        """What a decoded token waits for, by part; the sum is its time."""
        kv = self.kv_bytes(context) / self._bandwidth(self.calibration.bw_kv)
        attend = 2 * context * -(-self.shape.width // self.tiling.lanes) * self.shape.layers / self._hz
        rows = 0.0 if self.calibration.eta < 1 else self.row_cycles() * self.shape.layers / self._hz
        parts = {
            "weights": self.load_seconds(),
            "look-up": self.linear_seconds(),
            "cache": max(kv, attend),
            "rows": rows,
        }
        if self.overlap:
            # Weights come in all the time; the ports of the cache are others. What computes is a chain.
            chain = parts["look-up"] + parts["cache"] + rows
            parts = {"weights": max(parts["weights"], chain)}
        return {**parts, "head": self.head_seconds()}

    def tokens_per_s(self, context: int = 64) -> float:
        return 1 / sum(self.decode_seconds(context).values())

    def ttft_parts(self, tokens: int) -> dict[str, float]:
        """Seconds to the first token of a prompt, by part."""
        parts = {
            "weights": self.load_seconds(),
            "look-up": tokens * self.linear_seconds(),
            "attention": self.cycles("prefill_attention", tokens) / self._hz,
        }
        if self.overlap:
            # The first piece, then whichever is longer.
            first = self.load_seconds() / self.shape.layers / 4
            parts = {
                "weights": first,
                "look-up": max(parts["look-up"], parts["weights"] - first),
                "attention": parts["attention"],
            }
        return {**parts, "head": self.head_seconds()}

    def ttft(self, tokens: int) -> float:
        return sum(self.ttft_parts(tokens).values())

    def prefill_tokens_per_s(self, tokens: int) -> float:
        return tokens / self.ttft(tokens)

    # Logic

    def resources(self) -> Resources:
        """An estimate of the whole accelerator, scaled from the paper's per-unit table; see :mod:`.logic`."""
        from tilewright.edge.tellme.logic import estimate

        return estimate(self)

    def report(self) -> dict[str, Any]:
        """Everything, as JSON types; calibrated parameters and ideal ceilings beside the predictions."""
        ideal = replace(self, calibration=replace(self.calibration, eta=1.0), fill=0)
        resources = self.resources()
        return {
            "model": self.shape.name,
            "tiling": {k: getattr(self.tiling, k) for k in ("g", "t", "q", "p")},
            "clock_mhz": self.f_mhz,
            "options": {"fill": self.fill, "fused": self.fused, "overlap": self.overlap, "packing": self.packing},
            "calibrated": dict(vars(self.calibration)),
            "weight_megabytes": self.weight_bytes() / 1e6,
            "kv_bytes_per_context_token": self.kv_bytes(1),
            "cycles_per_token_layer": self.layer_cycles(),
            "decode_tokens_per_s": {n: self.tokens_per_s(n) for n in (64, 256, 1024)},
            "decode_seconds_at_64": self.decode_seconds(64),
            "ttft_seconds": {n: self.ttft(n) for n in (64, 128, 256, 1024)},
            "ideal_prefill_ceiling_tokens_per_s": 1 / ideal.linear_seconds(),
            "uram_weight_buffer": self.uram(),
            "resources": dict(vars(resources)),
            "fits_the_papers_budget": resources.fits(PAPER_BUDGET),
        }
