# SPDX-License-Identifier: Apache-2.0
"""`tw steer`: learn activation maps from two sets of texts, generate with them, see what they do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, read_text, use_threads

if TYPE_CHECKING:
    from tilewright.steer.steering import Steering

app = typer.Typer(no_args_is_help=True, help="Steer a model by affine maps on its activations (LinEAS and others).")

Source = Annotated[Path | None, typer.Option("--source", help="Texts to move away from, one a line.")]
Target = Annotated[Path | None, typer.Option("--target", help="Texts to move towards, one a line.")]
Pair = Annotated[
    str | None,
    typer.Option("--pair", help="Shipped texts instead: weather-animals, present-past or plain-exclamatory."),
]


def read_sides(source: Path | None, target: Path | None, pair: str | None, part: str) -> tuple[list[str], list[str]]:
    """Texts of both sides from files or from a shipped pair."""
    if (pair is None) != (source is not None and target is not None) or (pair and (source or target)):
        raise ValueError("give texts once: --source FILE and --target FILE, or --pair NAME")
    if pair is not None:
        from tilewright.steer.pairs import pair as shipped

        return shipped(pair, part)
    assert source is not None
    assert target is not None
    sides = [[line.strip() for line in read_text(path, "the texts").splitlines()] for path in (source, target)]
    lists = [[line for line in lines if line] for lines in sides]
    for path, lines in zip((source, target), lists, strict=True):
        if not lines:
            raise ValueError(f"{path}: holds no text; write one a line")
    return lists[0], lists[1]


def load_module(model: str, threads: int | None) -> tuple[Any, Any]:
    """Transformers' form of a model in float32, and its tokenizer."""
    from tilewright.models import load, to_transformers

    path = model_path(model)
    use_threads(threads)
    loaded = load(path)
    return to_transformers(loaded, dequantize=True), loaded.tokenizer


@app.command("fit")
def fit(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the maps (safetensors).")],
    source: Source = None,
    target: Target = None,
    pair: Pair = None,
    method: Annotated[
        str, typer.Option("--method", help="lineas, lin_act, gaussian_act, mean_act, diffmean, iti_c or aura.")
    ] = "lineas",
    modules: Annotated[
        str, typer.Option("--modules", help="norm, block, or a pattern such as model.layers.*.mlp.")
    ] = "norm",
    layers: Annotated[str | None, typer.Option("--layers", help="Only these blocks, for example 0-11.")] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="mean, last or max over a text's tokens.")] = "mean",
    steps: Annotated[int, typer.Option("--steps", min=1, help="LinEAS: gradient steps.")] = 200,
    lr: Annotated[float, typer.Option("--lr", help="LinEAS: step size.")] = 0.01,
    optimizer: Annotated[str, typer.Option("--optimizer", help="LinEAS: adam, or the paper's sgd.")] = "adam",
    gamma: Annotated[float, typer.Option("--gamma", help="LinEAS: weight of the sparse regulariser.")] = 0.0,
    normalize: Annotated[
        str, typer.Option("--normalize", help="LinEAS: none, or std to put layers on one scale.")
    ] = "none",
    seed: Annotated[int, typer.Option("--seed", help="LinEAS: of the batches.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Learn maps that move activations from the source texts to the target texts."""
    from tilewright.steer import steer

    sides = read_sides(source, target, pair, "train")
    options: dict[str, Any] = {}
    if method == "lineas":
        options = {
            "steps": steps,
            "lr": lr,
            "optimizer": optimizer,
            "gamma": gamma,
            "normalize": normalize,
            "seed": seed,
        }
    module, tokenizer = load_module(model, threads)
    wanted: Any = pooling
    found = steer(
        module,
        method,
        source=sides[0],
        target=sides[1],
        tokenizer=tokenizer,
        modules=modules,
        layers=parse_layers(layers),
        pooling=wanted,
        **options,
    )
    found.save(output)
    describe(found, output, as_json)


def parse_layers(text: str | None) -> list[int] | None:
    """ "3", "0-11" or "0-3,8" to block numbers."""
    if text is None:
        return None
    numbers: list[int] = []
    try:
        for piece in text.split(","):
            first, _, last = piece.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--layers {text}: needed block numbers and ranges, for example 0-11 or 3,5,7") from None
    return numbers


def describe(found: Steering, output: Path, as_json: bool) -> None:
    """What was learned, in a line or as JSON."""
    losses = found.report.get("loss", [])
    facts = {
        "output": str(output),
        "method": found.method,
        "places": len(found.maps),
        "coordinates": sum(one.width for one in found.maps.values()),
        "support": found.support(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    if as_json:
        print_json(facts)
        return
    trained = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
    print(
        f"{found.method}: {facts['places']} maps, {facts['coordinates']} coordinates, "
        f"{100 * found.support():.1f} % of them moved{trained}; wrote {output}"
    )


@app.command("generate")
def generate(
    model: Model,
    steer: Annotated[str, typer.Option("--steer", metavar="FILE", help="Maps written by `tw steer fit`.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt.")],
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="How much; repeat it to compare. 0 and 1 if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 24,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The same prompt at several strengths, greedily, in the decode engine."""
    from tilewright.cli.session import open_session
    from tilewright.models.engine import SamplingConfig

    texts = {}
    for one in strength or [0.0, 1.0]:
        session = open_session(model, threads=threads)
        session.steer(steer, one)
        ids = session.encode(prompt)
        session.start(min(len(ids) + max_new_tokens, session.limit))
        texts[one] = "".join(session.generate(ids, SamplingConfig(), max_new_tokens))
    if as_json:
        print_json({"prompt": prompt, "texts": [{"strength": s, "text": text} for s, text in texts.items()]})
        return
    for one, text in texts.items():
        print(f"strength {one:g}: {' '.join(text.split())}")


@app.command("eval")
def evaluate(
    model: Model,
    steer: Annotated[Path, typer.Option("--steer", metavar="FILE", help="Maps written by `tw steer fit`.")],
    source: Source = None,
    target: Target = None,
    pair: Pair = None,
    strength: Annotated[list[float] | None, typer.Option("--strength", help="May be repeated; 0, 0.5 and 1.")] = None,
    text: Annotated[str, typer.Option("--text", metavar="NAME|FILE", help="For the perplexity.")] = "speeches",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Of the perplexity's text.")] = 512,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Distance to the target, a probe's score of it, and the perplexity of other text, by strength."""
    from tilewright.data import CORPORA, corpus
    from tilewright.evaluate import perplexity, tokenize
    from tilewright.steer.evaluation import Evaluation
    from tilewright.steer.steering import Steering

    sides = read_sides(source, target, pair, "held-out")
    found = Steering.load(steer)
    module, tokenizer = load_module(model, threads)
    evaluation = Evaluation(module, tokenizer, found, *sides)
    words = corpus(text, "evaluation") if text in CORPORA else read_text(Path(text), "the text")
    tokens = tokenize(tokenizer, words, max_tokens=max_tokens)
    rows = []
    for one in strength or [0.0, 0.5, 1.0]:
        with found.transform(module, one):
            neutral = perplexity(module, tokens, window=min(256, len(tokens))).perplexity
        rows.append(
            {
                "strength": one,
                "loss": evaluation.loss(one),
                "target_score": evaluation.score(one),
                "perplexity": neutral,
            }
        )
    if as_json:
        print_json({"steer": str(steer), "method": found.method, "rows": rows})
        return
    print("strength  distance to target  probe's target score  perplexity")
    for row in rows:
        print(f"{row['strength']:8.2f}  {row['loss']:18.4g}  {row['target_score']:20.3f}  {row['perplexity']:10.2f}")


VERBS = {"steer": app}
