# SPDX-License-Identifier: Apache-2.0
"""`tw sae`: train a sparse autoencoder on a layer, take its error apart, code better at inference time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, read_text, use_threads

if TYPE_CHECKING:
    import torch

    from tilewright.inspect.sae import Rows

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders: train, analyse the error, pursue better codes.")

Site = Annotated[str, typer.Option("--site", help="The activation, by module name (its output).")]
Text = Annotated[
    str, typer.Option("--text", metavar="NAME|FILE", help="speeches, moby-dick, encyclopedia, or a text file.")
]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Use only the text's beginning.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens of a context.")]
Skip = Annotated[int, typer.Option("--skip", min=0, help="First positions of each context to leave out.")]
Folder = Annotated[Path, typer.Argument(metavar="SAE", help="Folder of an SAE, as `tw sae train` or SAELens wrote it.")]
OfModel = Annotated[str, typer.Option("--model", metavar="MODEL", help="The model whose activations it codes.")]


class _Source:
    """A model, a text and a site."""

    def __init__(self, model: str, text: str, part: str, tokens: int | None, length: int) -> None:
        from tilewright.data import CORPORA, corpus
        from tilewright.evaluate import token_batches, tokenize
        from tilewright.models import load, to_transformers

        loaded = load(model_path(model))
        words = corpus(text, part) if text in CORPORA else read_text(Path(text), "the text")
        self.batches = token_batches(tokenize(loaded.tokenizer, words, max_tokens=tokens), length=length)
        self.module: Any = to_transformers(loaded, dequantize=True)

    @contextlib.contextmanager
    def rows(self, site: str, skip: int, folder: Path | None = None, share: slice = slice(None)) -> Iterator[Rows]:
        """Activations of the batches, recorded in a folder (a temporary one if none is given)."""
        from tilewright.capture import record
        from tilewright.inspect.sae import Rows

        with tempfile.TemporaryDirectory(prefix="tilewright-sae-") as temporary:
            where = folder or Path(temporary) / "activations"
            yield Rows(record(self.module, self.batches[share], [site], where), skip=skip)


@app.command()
def train(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new SAE.")],
    site: Site = "model.layers.15",
    kind: Annotated[str, typer.Option("--kind", help="topk, batchtopk or jumprelu.")] = "topk",
    width: Annotated[int, typer.Option("--width", min=1, help="Latents.")] = 4608,
    k: Annotated[int, typer.Option("--k", min=1, help="Active latents of a token (topk, batchtopk).")] = 32,
    sparsity: Annotated[float, typer.Option("--sparsity", min=0, help="Weight of the L0 loss (jumprelu).")] = 1e-3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 600,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Tokens of a step.")] = 512,
    rate: Annotated[
        float | None, typer.Option("--lr", help="Highest learning rate; the recipe's if not given.")
    ] = None,
    auxk: Annotated[float, typer.Option("--auxk", min=0, help="Weight of the dead latents' loss; 1/32 in Gao.")] = 0.0,
    normalize: Annotated[str, typer.Option("--normalize", help="scale, center or none.")] = "scale",
    text: Text = "speeches",
    tokens: Tokens = None,
    length: Length = 256,
    skip: Skip = 20,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of activations: read if it is there, else recorded into.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="File to save to and to go on from.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and order.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train an SAE on the activations of one layer over a text; the folder loads in SAELens too."""
    from tilewright.capture import ActivationStore
    from tilewright.inspect.sae import Rows, SAEConfig, SAETrainer, save_sae

    path = model_path(model)
    use_threads(threads)
    config = SAEConfig(
        kind=kind, width=width, k=k, sparsity=sparsity, steps=steps, batch=batch, lr=rate, auxk_alpha=auxk,
        normalize=normalize, seed=seed,
    )  # fmt: skip
    trainer = SAETrainer(config)
    metadata = {"model_name": path.name, "hook_name": site, "context_size": length, "skip": skip, "text": text}

    def fit(rows: Rows) -> int:
        sae = trainer.fit(rows, checkpoint=checkpoint, metadata=metadata)
        save_sae(sae, output)
        return len(rows)

    if store is not None and store.exists():
        point = f"{site}@output"
        count = fit(Rows(ActivationStore(store), point, skip=skip))
    else:
        with _Source(model, text, "calibration", tokens, length).rows(site, skip, store) as rows:
            count = fit(rows)
    last = trainer.history[-max(1, steps // 20) :]
    report = {
        "output": str(output),
        "site": site,
        "rows": count,
        "config": config.to_dict(),
        "fvu": sum(one["fvu"] for one in last) / len(last),
        "l0": sum(one["l0"] for one in last) / len(last),
    }
    if as_json:
        print_json(report)
        return
    print(f"{output}: {kind} SAE of {width} latents on {site}, {count:,} rows")
    print(f"training FVU {report['fvu']:.4f}, L0 {report['l0']:.1f} (means of the last {len(last)} steps)")


@app.command()
def analyse(
    sae: Folder,
    model: OfModel = "smollm2",
    site: Annotated[str | None, typer.Option("--site", help="The activation; the SAE's own if not given.")] = None,
    text: Text = "speeches",
    tokens: Tokens = None,
    length: Length = 256,
    skip: Skip = 20,
    robust: Annotated[bool, typer.Option("--robust", help="Leave out the three loudest channels.")] = False,
    downstream: Annotated[int, typer.Option("--downstream", min=0, help="Contexts for the model's loss; 0 none.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How much of an SAE's error is linear in the activation, how predictable its norm is, and what each part costs."""
    from tilewright.inspect.sae_dark_matter import SAEErrorAnalysis, downstream_loss

    use_threads(threads)
    loaded, where = _opened(sae, site)
    source = _Source(model, text, "evaluation", tokens, length)
    half = len(source.batches) // 2
    with (
        source.rows(where, skip, share=slice(half)) as fit,
        source.rows(where, skip, share=slice(half, None)) as held_out,
    ):
        analysis = SAEErrorAnalysis(loaded, fit, held_out)
        fvu, r2 = analysis.fvu(robust=robust), analysis.r2(robust=robust)
        report: dict[str, Any] = {
            "sae": str(sae),
            "site": where,
            "tokens": len(held_out),
            "fvu": asdict(fvu) | {"linear": fvu.linear},
            "r2": asdict(r2),
            "squared_norm_r2": analysis.norm_prediction(robust=robust),
            "baselines": analysis.baselines(_ids(fit, held_out)),
        }
        if downstream:
            cost = downstream_loss(
                source.module, where, loaded, analysis.B, source.batches[half : half + downstream], skip=skip
            )
            report["downstream"] = {"loss": cost.loss, "recovered": cost.recovered, "tokens": cost.tokens}
    if as_json:
        print_json(report)
        return
    for line in described(report):
        print(line)


def described(report: dict[str, Any]) -> list[str]:
    """The lines that `tw sae analyse` prints."""
    fvu, r2 = report["fvu"], report["r2"]
    lines = [
        f"{report['sae']} on {report['site']}, {report['tokens']:,} tokens, L0 {fvu['l0']:.1f}",
        f"variance unexplained {fvu['sae']:.4f} = linear {fvu['linear']:.4f} + nonlinear {fvu['nonlinear']:.4f}",
        f"linear share of the error: {r2['r2_global']:.3f} of all, {r2['r2_dim_mean']:.3f} mean of dimensions, "
        f"{r2['shuffled']:.3f} for shuffled errors, {r2['r2_rescaled']:.3f} after rescaling by {r2['shrinkage']:.3f}",
        "R^2 of squared norms, predicted linearly from x:",
    ]
    lines += [f"  {name:<14}{value:7.3f}" for name, value in report["squared_norm_r2"].items()]
    lines.append("R^2 of the error's squared norm, predicted from less:")
    lines += [f"  {name:<14}{value:7.3f}" for name, value in report["baselines"].items()]
    if "downstream" in report:
        loss, shares = report["downstream"]["loss"], report["downstream"]["recovered"]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in loss.items())
        lines.append(f"next-token loss over {report['downstream']['tokens']:,} tokens: {shown}")
        shown = ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items())
        lines.append(f"of the extra loss, adding back a part recovers: {shown}")
    return lines


@app.command()
def pursuit(
    sae: Folder,
    model: OfModel = "smollm2",
    site: Annotated[str | None, typer.Option("--site", help="The activation; the SAE's own if not given.")] = None,
    text: Text = "speeches",
    tokens: Tokens = 2048,
    length: Length = 256,
    skip: Skip = 20,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Codes of the same L0 found by gradient pursuit over the SAE's decoder: how much error a better encoder saves."""
    import torch

    from tilewright.inspect.sae.losses import variance
    from tilewright.inspect.sae_dark_matter import pursue_sae

    use_threads(threads)
    loaded, where = _opened(sae, site)
    squares = {"sae": 0.0, "pursuit": 0.0}
    with _Source(model, text, "evaluation", tokens, length).rows(where, skip) as rows:
        whole = torch.cat(list(rows.blocks()))
    recon, l0 = loaded.reconstruct(whole)
    squares = {
        "sae": float((whole - recon).square().sum().detach()),
        "pursuit": float((whole - pursue_sae(loaded, whole).recon).square().sum()),
    }
    fvu = {name: total / float(variance(whole)) for name, total in squares.items()}
    report = {"sae": str(sae), "site": where, "tokens": len(whole), "l0": float(l0.float().mean()), "fvu": fvu}
    if as_json:
        print_json(report)
        return
    print(f"{sae} on {where}, {len(whole):,} tokens, L0 {report['l0']:.1f}")
    saved = 100 * (1 - fvu["pursuit"] / fvu["sae"])
    print(f"variance unexplained: encoder {fvu['sae']:.4f}, pursuit {fvu['pursuit']:.4f} ({saved:.1f} % less)")


def _opened(folder: Path, site: str | None) -> tuple[Any, str]:
    from tilewright.inspect.sae import load_sae

    loaded = load_sae(folder)
    where = site or loaded.metadata.get("hook_name")
    if not where:
        raise ValueError(f"{folder} does not say where it was trained; name the activation with --site")
    return loaded, where


def _ids(fit: Rows, held_out: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
    if fit.tokens is None or held_out.tokens is None:
        return None
    return fit.tokens[:, 2], held_out.tokens[:, 2]


VERBS = {"sae": app}
