# SPDX-License-Identifier: Apache-2.0
"""TeLLMe's claim: exact units, attention, the model of cycles and memory, the logic of the look-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
SHAPES = ((1536, 1536), (4096, 1536), (1536, 4096), (576, 576), (192, 576), (1536, 576), (576, 1536))


def _inputs(random: np.random.Generator, inputs: int) -> np.ndarray:
    """Activations: random, alternating extremes, all largest."""
    import numpy as np

    x = random.integers(-127, 128, (3, inputs), dtype=np.int8)
    x[1] = random.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), inputs)
    x[2] = 127
    return x


def product_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: the simulated HLS unit and the int64 product."""
    import numpy as np

    from tilewright.edge.contract import pack_tlmm
    from tilewright.edge.contract.weights import accumulate
    from tilewright.edge.hls import HlsUnits

    units, wrong = HlsUnits(), 0
    for seed in SEEDS[: 1 if experiment.quick else None]:
        random = np.random.default_rng(seed)
        for outputs, inputs in SHAPES:
            experiment.say(f"table look-up, {outputs} x {inputs}")
            weight = random.integers(-1, 2, (outputs, inputs), dtype=np.int8)
            x = _inputs(random, inputs)
            wrong += int((units.tlmm(x, pack_tlmm(weight)) != accumulate(x, weight)).sum())
    yield at_most("TLMM in HLS against int64 on the shapes of 0.73B and SmolLM2, sums that differ", wrong, 0, paper="0")
    one = units.tlmm(np.full((1, 4096), 127, np.int8), pack_tlmm(np.ones((16, 4096), np.int8)))
    yield at_most("4096 weights of 1, activations of 127: distance from 520,192 (int16 chains give -528,384)",
                  int(np.abs(one - 520192).max()), 0)  # fmt: skip


def unit_rows(experiment: Experiment) -> Iterator[Row]:
    """All units and whole layers: HLS against the contract at four points of (G, T, Q, P)."""
    import numpy as np

    from tilewright.edge import contract as c
    from tilewright.edge.hls import HlsUnits, points

    wrong, steps = 0, 0
    for point in points():
        experiment.say(f"layers at (G, T, Q, P) = {point}")
        tiling = c.Tiling(*point)
        for seed in SEEDS:
            random = np.random.default_rng(seed)
            layer = _random_layer(random, tiling)
            x = (random.standard_normal((9, 96)) * 10.0 ** random.uniform(-2, 1, (9, 96))).astype(np.float16)
            caches = [c.KvCache.empty(9, 2, 16) for _ in range(3)]
            angles = c.rope_table(9, 16)
            python = c.decoder_layer(x, layer, caches[0], angles)
            hls = c.decoder_layer(x, layer, caches[1], angles, HlsUnits(tiling))
            one_by_one = [c.decoder_layer(x[i : i + 1], layer, caches[2], angles, HlsUnits(tiling)) for i in range(9)]
            wrong += int((python.view(np.uint16) != hls.view(np.uint16)).sum())
            steps += int((hls.view(np.uint16) != np.concatenate(one_by_one).view(np.uint16)).sum())
    yield at_most("decoder layers, HLS against the contract, float16 that differ in a bit", wrong, 0)
    yield at_most("a prompt against the same tokens one by one, float16 that differ in a bit", steps, 0)


def _random_layer(random: np.random.Generator, tiling: Any) -> Any:
    import numpy as np

    from tilewright.edge.contract import Factor, Layer, Linear, pack_tlmm

    def linear(inputs: int, outputs: int, norm: bool) -> Linear:
        weight = pack_tlmm(random.integers(-1, 2, (outputs, inputs), dtype=np.int8), tiling)
        gain = random.uniform(0.5, 2, inputs).astype(np.float16) if norm else None
        return Linear(weight, Factor.of(inputs**-0.5 / 127), gain)

    return Layer(
        linear(96, 96, True), linear(96, 32, False), linear(96, 32, False), linear(96, 96, True), linear(96, 250, True),
        linear(96, 250, False), linear(250, 96, True), heads=6, kv_heads=2, head_size=16, eps=1e-5,
    )  # fmt: skip


def attention_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 6."""
    import numpy as np

    from tilewright.edge.hls import HlsUnits
    from tilewright.edge.reference import softmax_attention

    experiment.say("attention")
    worst, apart = 0.0, 0
    tokens = 64 if experiment.quick else 128
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        q, k, v = (random.standard_normal((tokens, heads, 96)).astype(np.float16) for heads in (16, 16, 16))
        units = HlsUnits()
        got = units.attention(q[:, :2], k[:, :2], v[:, :2])
        worst = max(worst, float(np.abs(got - softmax_attention(q[:, :2], k[:, :2], v[:, :2])).max()))
        apart += abs(units.traffic[0] - (tokens**2 // 8 + tokens // 2))
    yield at_most("prefill attention against float64 softmax, largest difference", worst, 2e-3, paper="2e-3")
    yield at_most("key rows read against N^2 / (2 P) + N / 2, difference", apart, 0, paper="0")


def real_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2: SmolLM2's weights rounded to ternary, 64 tokens of text through HLS and through float64 layers."""
    import numpy as np

    from tilewright import data, evaluate, models
    from tilewright.edge import reference
    from tilewright.edge.contract.layer import KvCache, decoder_layer
    from tilewright.edge.contract.rows import rope_table
    from tilewright.edge.hls import HlsUnits
    from tilewright.edge.model import EdgeModel

    wrong, sums = 0, 0

    class Checked(HlsUnits):
        def tlmm(self, x: Any, weights: Any, status: Any = None) -> Any:
            nonlocal wrong, sums
            acc = super().tlmm(x, weights, status)
            # float32 sums of up to 2^24 are exact.
            true = x.astype(np.float32) @ weights.unpack().astype(np.float32).T
            wrong, sums = wrong + int((acc != true).sum()), sums + acc.size
            return acc

    loaded = models.load(data.smollm2_gguf())
    module: Any = models.to_transformers(loaded, dequantize=True)
    count = 2 if experiment.quick else len(module.model.layers)
    module.model.layers = module.model.layers[:count]
    edge = EdgeModel.from_transformers(module)
    ids = evaluate.text_corpus(loaded.tokenizer, "speeches", "evaluation", max_tokens=64).numpy()[:64]
    x, units, angles = edge.embedding[ids], Checked(), rope_table(64, 64, edge.rope_base)
    apart = []
    for index, layer in enumerate(edge.layers):
        experiment.say(f"SmolLM2, layer {index + 1} of {count}")
        after = decoder_layer(x, layer, KvCache.empty(64, 3, 64), angles, units)
        true = reference.decoder_layer(x.astype(np.float64), layer, edge.rope_base)
        change = float(np.abs(true - x).max())
        apart.append(float(np.abs(after - true).max()) / change)
        x = after
    experiment.values["layers"] = apart
    yield at_most(
        f"SmolLM2-135M as ternary, 64 tokens, {count} layers: of {sums} accumulators in HLS, wrong", wrong, 0, paper="0"
    )
    yield Row("each layer against float64 BitLinear on the same input, largest difference over largest change", "",
              max(apart), "reported", True)  # fmt: skip


def logic_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 4, from the recorded counts of `scripts/rtl_resources.py`, which the tests of the RTL check."""
    from tilewright.edge.tellme.synthesis import study, units

    experiment.say("logic")
    select, half, full = (study(f"look-up, {one}").lut for one in ("select", "half table", "full table"))
    yield at_most("LUTs of a lane's 28 look-ups, full tables over selection (Yosys)", full / select, 0.55, paper="0.53")
    yield at_most("the same over half tables with a sign (Yosys)", full / half, 0.9, paper="0.66")
    lanes = {
        2: study("look-up, full table, G = 2"),
        3: study("look-up, full table"),
        4: study("look-up, full table, G = 4"),
    }
    cost = {g: (study(f"tables' sums, G = {g}").lut + 16 * one.lut) / (84 * 16) for g, one in lanes.items()}
    experiment.values["lut_per_weight"] = cost
    yield at_most("LUTs a weight at G = 3 over the lesser of G = 2 and 4 (Yosys)", cost[3] / min(cost[2], cost[4]), 1.0)
    yield at_most("distance of a 144 x 4096 bank from two URAM288 (Yosys)", abs(study("a bank of weights").uram - 2), 0)
    core = next(one for one in units() if one.name == "tlmm_core")
    yield at_most(
        "LUTs of the table-lookup core in RTL at T = 28, Q = 16 (Yosys)", core.lut, 43137, paper="43,137 with fuse"
    )


def model_rows(experiment: Experiment) -> Iterator[Row]:
    """Items 5 and 7, and ours: what the schedule gives under the paper's memory and host."""
    from tilewright.edge.tellme import BITNET_0_73B, OURS, PAPER_BUDGET, SMOLLM2_135M, TellmeConfig
    from tilewright.edge.tellme.presets import PEER_SMOLLM2
    from tilewright.edge.tellme.search import search

    experiment.say("cycles and memory")
    paper = TellmeConfig(BITNET_0_73B)
    ours = replace(paper, calibration=OURS, fill=27, fused=True)
    found = search(BITNET_0_73B)
    plain = search(BITNET_0_73B, packings=("beats",))
    best = found[0].config
    small = TellmeConfig(SMOLLM2_135M, calibration=OURS, f_mhz=100, fill=27, fused=True)
    experiment.values["decode"] = {
        "paper": paper.decode_seconds(), "ours": ours.decode_seconds(), "best": best.decode_seconds()
    }  # fmt: skip
    experiment.values["ttft"] = {
        name: [one.ttft(n) for n in (16, 32, 64, 128, 256, 512)]
        for name, one in (("paper", paper), ("ours", ours), ("best", best))
    }
    experiment.values["best"] = best.report()
    yield at_most(
        "UltraRAMs of the weight buffer, difference from the paper's 48", abs(paper.uram() - 48), 0, paper="48"
    )
    fitted = "fitted BW_w, t_head, eta"
    yield at_most(
        f"decode at 64 tokens ({fitted}): distance from 25 tokens/s", abs(paper.tokens_per_s() - 25), 1.0, paper="25"
    )
    yield at_most(f"TTFT of 64 tokens ({fitted}): distance from 0.45 s", abs(paper.ttft(64) - 0.45), 0.02, paper="0.45")
    yield at_most(
        f"TTFT of 128 tokens ({fitted}): distance from 0.96 s", abs(paper.ttft(128) - 0.96), 0.03, paper="0.96"
    )
    sweep, ideal = ours.linear_cycles(1536, 4608), paper.linear_cycles(1536, 4608)
    yield at_most("cycles that filling tables adds to q, k, v in one sweep (0.28 in three)", sweep / ideal - 1, 0.1)
    unfused = replace(ours, fused=False)
    fill = [one.layer_cycles() / replace(one, fill=0).layer_cycles() - 1 for one in (unfused, ours)]
    yield Row("the same for a layer, fused over unfused (gate and up exceed the buffer together)", "",
              fill[1] / fill[0], "reported", True)  # fmt: skip
    yield at_least(
        "our schedule at (28, 16, 4), same memory and host: decode, tokens/s", ours.tokens_per_s(), 25, paper="25"
    )
    yield at_most("our schedule: TTFT of 64, s", ours.ttft(64), 0.45, paper="0.45")
    yield at_most("our schedule: TTFT of 128, s", ours.ttft(128), 0.96, paper="0.96")
    resources = best.resources()
    t = best.tiling
    name = (
        f"best build inside the paper's resources (T {t.t}, Q {t.q}, P {t.p}, overlap {best.overlap}, {best.packing})"
    )
    yield at_least(f"{name}: decode over the paper's", found[0].decode, 1.3)
    yield at_least("the same: prefill over the paper's, lesser of 64 and 128", found[0].prefill, 2.0)
    yield at_most("the same: LUTs", resources.lut, PAPER_BUDGET.lut, paper="98,303")
    yield Row("best build with the paper's packing: decode over the paper's", "", plain[0].decode, "reported", True)
    yield at_least("SmolLM2-135M as ternary at 100 MHz: decode over the int8 peer's 27 tokens/s",
                   small.tokens_per_s() / PEER_SMOLLM2["decode_tokens_per_s"], 1.0)  # fmt: skip
    yield at_least("SmolLM2-135M as ternary at 100 MHz, 128 tokens: prefill over the peer's 73.6 tokens/s",
                   small.prefill_tokens_per_s(128) / PEER_SMOLLM2["prefill_tokens_per_s"], 1.0)  # fmt: skip


def rtl_rows(experiment: Experiment) -> Iterator[Row]:
    """The RTL as it is: its own schedule under the paper's memory and host, its resources as Yosys counts them."""
    from tilewright.edge.tellme import BITNET_0_73B, PAPER_BUDGET
    from tilewright.edge.tellme.report import decode_seconds, prompt_seconds, rtl_config
    from tilewright.edge.tellme.synthesis import total

    config = rtl_config(BITNET_0_73B)
    t, decode = config.tiling, decode_seconds(config, 64)
    name = f"RTL at ({t.t}, {t.q}, {t.p}), {t.lanes} lanes, every cycle of its schedule"
    experiment.values["decode"]["rtl"] = {
        "weights": decode["weights"], "look-up": decode["rows and look-up"] + decode["descriptors"],
        "cache": decode["attention"], "head": decode["head (host)"],
    }  # fmt: skip
    experiment.values["ttft"]["rtl"] = [sum(prompt_seconds(config, n).values()) for n in (16, 32, 64, 128, 256, 512)]
    yield at_least(f"{name}: decode, tokens/s", 1 / sum(decode.values()), 25, paper="25")
    for tokens, most in ((64, 0.45), (128, 0.96)):
        seconds = sum(prompt_seconds(config, tokens).values())
        yield at_most(f"the same: TTFT of {tokens}, s", seconds, most, paper=str(most))
    found, _ = total()
    for kind, unit in (("lut", "LUTs"), ("dsp", "DSPs"), ("bram", "block RAMs"), ("uram", "UltraRAMs")):
        most = getattr(PAPER_BUDGET, kind)
        yield at_most(f"the same: {unit} (Yosys, sum of all units)", getattr(found, kind), most, paper=f"{most:,}")


def run(experiment: Experiment) -> Iterator[Row]:
    """The rows; the quick form takes one seed and two layers of the real model."""
    yield from product_rows(experiment)
    yield from unit_rows(experiment)
    yield from attention_rows(experiment)
    yield from real_rows(experiment)
    yield from logic_rows(experiment)
    yield from model_rows(experiment)
    yield from rtl_rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Where a decoded token's time goes, and the time to the first token over the prompt."""
    left, right = figure.subplots(1, 2)
    names = {"paper": "paper's\n(fitted)", "ours": "our\nschedule", "rtl": "RTL", "best": "best in\nthe budget"}
    labels = {
        "weights": "weights from memory",
        "look-up": "table look-up (RTL: with norms)",
        "cache": "KV cache",
        "rows": "norms",
        "head": "LM head (host)",
    }
    colours = dict(zip(labels, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#bbbbbb"), strict=True))
    for at, key in enumerate(names):
        bottom = 0.0
        for part, label in labels.items():
            size = values["decode"][key].get(part, 0.0) * 1e3
            left.bar(at, size, bottom=bottom, color=colours[part], label=label if at == 0 else None)
            bottom += size
        left.annotate(f"{1e3 / bottom:.1f}/s", (at, bottom), ha="center", va="bottom")
    left.set_xticks(range(len(names)), list(names.values()))
    left.set_ylabel("ms for a token (and tokens a second), 64 of context")
    left.set_ylim(0, 64)
    left.legend(fontsize="small", loc="upper right")
    tokens = [16, 32, 64, 128, 256, 512]
    for key, marker in (("paper", "o-"), ("ours", "s-"), ("rtl", "d-"), ("best", "^-")):
        right.plot(tokens, values["ttft"][key], marker, label=names[key].replace("\n", " "))
    right.plot([64, 128], [0.45, 0.96], "kx", markersize=10, label="published")
    right.set_xscale("log", base=2)
    right.set_xticks(tokens, [str(n) for n in tokens])
    right.set_yscale("log")
    right.set_xlabel("tokens of the prompt")
    right.set_ylabel("seconds to the first token")
    right.legend(fontsize="small")
    figure.suptitle("BitNet 0.73B on KV260 at 250 MHz: predictions under one memory and host model")
    figure.tight_layout()


CLAIM = Claim(
    "tellme",
    "TeLLMe v2: ternary products by table look-up on an edge FPGA",
    "Qiao et al. 2025, arXiv 2510.15926",
    run,
    plot,
)
