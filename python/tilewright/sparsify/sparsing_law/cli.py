# SPDX-License-Identifier: Apache-2.0
"""`tw sparsity`: how many neurons a model needs, what fewer cost, and where training takes the number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, read_text, use_threads

if TYPE_CHECKING:
    from tilewright.sparsify.sparsing_law import Law, Measurement, SparsityReport

app = typer.Typer(no_args_is_help=True, help="Activation sparsity: measure, compare metrics, fit its law.")

Text = Annotated[
    str,
    typer.Option("--text", metavar="NAME|FILE", help="speeches, moby-dick, encyclopedia, or a text file."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=16, help="Tokens that are measured.")]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens of one sequence.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="JSON to write.")]
METRIC_HELP = "cett, cats, fat, topk or zero."


@app.command()
def measure(
    model: Model,
    metric: Annotated[str, typer.Option("--metric", help=METRIC_HELP)] = "cett",
    p: Annotated[float | None, typer.Option("--p", help="Rise of perplexity in %. [default: 1]")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of active neurons, instead of --p.")] = None,
    arg: Annotated[float | None, typer.Option("--arg", help="The metric's own number, instead of --p.")] = None,
    tol: Annotated[float | None, typer.Option("--tol", help="Width at which the search ends.")] = None,
    text: Text = "speeches",
    tokens: Tokens = 2048,
    window: Window = 512,
    export: Annotated[Path | None, typer.Option("--export", help="Thresholds to write, .json or .safetensors.")] = None,
    output: Output = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How many neurons a token needs when perplexity may rise by P percent, by layer."""
    from tilewright.sparsify.sparsing_law import export_thresholds, frequency_distribution, sparsity

    if p is None and ratio is None and arg is None and metric != "zero":
        p = 1.0
    measured = _measurement(model, text, tokens, window, threads)
    report = sparsity(measured, metric=metric, arg=arg, p=p, ratio=ratio, tol=tol)
    if export is not None:
        export_thresholds(report, export)
    frequency = vars(frequency_distribution(report.frequency))
    document = {"verb": "measure", "model": model, "text": text, "report": report.to_dict(), "frequency": frequency}
    _give(document, output, as_json, lambda: report_lines(report))


def report_lines(report: SparsityReport) -> list[str]:
    """A line a layer, the mean, what it costs, and what to know about it."""
    width = max(len(name) for name in report.per_layer)
    lines = [f"{'block':{width}}  active %"]
    lines += [f"{name:{width}}  {100 * value:8.2f}" for name, value in report.per_layer.items()]
    lines.append(
        f"{report.metric} {report.arg:.4g}: {100 * report.activation_ratio:.2f} % of neurons active over "
        f"{report.tokens:,} tokens; perplexity {report.ppl_dense:.3f} -> {report.ppl_sparse:.3f}, "
        f"x {report.ppl_ratio:.4f} (standard error {report.stderr:.4f})"
    )
    return lines + [f"note: {note}" for note in report.notes]


@app.command()
def pareto(
    model: Model,
    metrics: Annotated[str, typer.Option("--metrics", help="Comma-separated.")] = "cett,topk,fat,cats",
    ratios: Annotated[str, typer.Option("--ratios", help="Shares of active neurons, comma-separated.")] = "0.7,0.5,0.4",
    text: Text = "speeches",
    tokens: Tokens = 2048,
    window: Window = 512,
    output: Output = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity of several metrics at equal shares of active neurons."""
    from tilewright.sparsify.sparsing_law import pareto as curve

    grid = [_number(word, "--ratios") for word in ratios.split(",")]
    measured = _measurement(model, text, tokens, window, threads)
    found = {metric: curve(measured, metric=metric, grid=grid, by="ratio") for metric in metrics.split(",")}
    curves = {metric: [report.to_dict() for report in reports] for metric, reports in found.items()}
    document = {"verb": "pareto", "model": model, "text": text, "curves": curves}
    _give(document, output, as_json, lambda: pareto_lines(found, grid))


def pareto_lines(found: dict[str, list[SparsityReport]], grid: list[float]) -> list[str]:
    """Perplexity over the dense model's: a line a metric, a column a ratio."""
    lines = [f"{'active %':10}" + "".join(f"{100 * ratio:10.1f}" for ratio in grid)]
    for metric, reports in found.items():
        lines.append(f"{metric:10}" + "".join(f"{report.ppl_ratio:10.4f}" for report in reports))
    return lines


@app.command()
def fit(
    curve: Annotated[Path, typer.Argument(metavar="CSV", help="Lines of tokens,activation ratio; a header may lead.")],
    kind: Annotated[str, typer.Option("--kind", help="relu (falls), silu (rises), or auto.")] = "auto",
    target: Annotated[float | None, typer.Option("--target", help="Ratio whose tokens are wanted.")] = None,
    unit: Annotated[float, typer.Option("--unit", help="Tokens in a unit of D.")] = 1e9,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Answer beyond 10 times the data.")] = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Fit the law of activation sparsity to the checkpoints of a training run: its limit, and tokens to a target."""
    from tilewright.sparsify.sparsing_law import fit_activation_law

    points = read_curve(curve)
    chosen: Any = kind
    law = fit_activation_law([d for d, _ in points], [a for _, a in points], chosen, unit=unit)
    tokens = None if target is None else law.tokens_to(target, extrapolate=extrapolate)
    document = {"verb": "fit", "points": points, "law": law.to_dict(), "target": target, "tokens_to_target": tokens}
    _give(document, output, as_json, lambda: law_lines(law, target, tokens))


def law_lines(law: Law, target: float | None, tokens: float | None) -> list[str]:
    """The form, its numbers, the limit with its interval, and the answer to the target."""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in law.params.items())
    low, high = law.ci()
    lines = [
        f"law {law.kind}: {numbers} (D in {law.unit:.3g} tokens); relative residual {100 * law.residual:.2f} %",
        f"limit {100 * law.limit:.2f} % of neurons active, 95 % interval {100 * low:.2f} to {100 * high:.2f}",
    ]
    if len(law.aic) > 1:
        lines.append("AIC: " + ", ".join(f"{form} {value:.1f}" for form, value in law.aic.items()))
    if target is not None:
        lines.append(f"{100 * target:.2f} % after {tokens:.4g} tokens")
    return lines


@app.command()
def plot(
    document: Annotated[Path, typer.Argument(metavar="JSON", help="What measure, pareto or fit wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, PDF or SVG to write.")],
) -> None:
    """Draw what was measured."""
    import json

    from matplotlib.figure import Figure

    from tilewright._files import atomic_write
    from tilewright.sparsify.sparsing_law.plots import draw

    try:
        found = json.loads(read_text(document, "the document"))
    except ValueError as wrong:
        raise ValueError(f"{document} is not JSON: {wrong}") from wrong
    if not isinstance(found, dict):
        raise ValueError(f"{document} holds no JSON object; give what measure, pareto or fit wrote")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(found, figure)
    with atomic_write(output) as path:
        figure.savefig(path, dpi=120, format=output.suffix.lstrip(".") or "png")


def _measurement(model: str, text: str, tokens: int, window: int, threads: int | None) -> Measurement:
    from tilewright.data import CORPORA, corpus
    from tilewright.evaluate import token_batches, tokenize
    from tilewright.models import load, to_transformers
    from tilewright.sparsify.sparsing_law import Measurement

    path = model_path(model)
    use_threads(threads)
    loaded = load(path)
    words = corpus(text, "evaluation") if text in CORPORA else read_text(Path(text), "the text")
    ids = tokenize(loaded.tokenizer, words, max_tokens=tokens)
    batches = token_batches(ids, length=min(window, tokens))
    return Measurement(to_transformers(loaded, dequantize=True), batches)


def read_curve(path: Path) -> list[tuple[float, float]]:
    """Points (tokens, ratio) of a CSV file; `ValueError` naming the line that holds none."""
    points = []
    for number, line in enumerate(read_text(path, "the curve").splitlines(), 1):
        words = [word.strip() for word in line.split(",")]
        if not line.strip() or (number == 1 and not _is_number(words[0])):
            continue
        if len(words) < 2 or not (_is_number(words[0]) and _is_number(words[1])):
            raise ValueError(f"{path}, line {number}: {line!r}; tokens,activation ratio is needed")
        points.append((float(words[0]), float(words[1])))
    return points


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(word: str, option: str) -> float:
    if not _is_number(word):
        raise ValueError(f"{option}: {word!r} is no number")
    return float(word)


def _give(document: dict[str, Any], output: Path | None, as_json: bool, lines: Any) -> None:
    if output is not None:
        import json

        from tilewright._files import atomic_write

        with atomic_write(output) as path:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        print("\n".join(lines()))


VERBS = {"sparsity": app}
