# SPDX-License-Identifier: Apache-2.0
"""`tw snmf`: features of one MLP layer: fit them, look at them, steer with one, see their tree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, read_text, use_threads

if TYPE_CHECKING:
    from tilewright.inspect.snmf.storage import FeatureSet

app = typer.Typer(no_args_is_help=True, help="Features of an MLP layer by semi-nonnegative factorisation.")

File = Annotated[Path, typer.Argument(metavar="FEATURES", help="File that `tw snmf fit` wrote.")]
Feature = Annotated[int | None, typer.Option("--feature", min=0, help="One feature, by number.")]


@app.command()
def fit(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file to write.")],
    layer: Annotated[int, typer.Option("--layer", min=0, help="Which layer's MLP.")] = 15,
    text: Annotated[
        str,
        typer.Option("--text", metavar="NAME|FILE", help="concepts, speeches, moby-dick, or a file, a text a line."),
    ] = "concepts",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Texts at most.")] = 400,
    components: Annotated[int, typer.Option("--components", "-k", min=1, help="Features.")] = 60,
    upper: Annotated[
        list[int] | None, typer.Option("--upper", min=1, help="Features of a level above; repeat, falling, for a tree.")
    ] = None,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of neurons of each feature.")] = 0.01,
    sweeps: Annotated[int, typer.Option("--sweeps", min=1, help="Sweeps at most.")] = 400,
    init: Annotated[str, typer.Option("--init", help="random, svd or kmeans.")] = "random",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the start.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Factorise the MLP activations of some texts and write the features to a file."""
    from tilewright.inspect.snmf import (
        HierarchicalSemiNMF,
        SemiNMF,
        collect_mlp_activations,
        feature_set,
        save_features,
    )

    use_threads(threads)
    path = model_path(model)
    module, tokenizer = open_model(path)
    x, index = collect_mlp_activations(module, tokenizer, texts_of(text, limit), layer)
    shared: dict[str, Any] = {"init": init, "sparsity": sparsity, "max_iter": sweeps, "random_state": seed,
                              "progress": None}  # fmt: skip
    if upper:
        tree = HierarchicalSemiNMF((components, *upper), **shared).fit(x)
        estimator: Any = tree.levels_[0].estimator
        made = feature_set(tree, estimator.transform(x), index, model=path.name, layer=layer)
    else:
        estimator = SemiNMF(components, **shared).fit(x)
        made = feature_set(estimator, estimator.transform(x), index, model=path.name, layer=layer)
    save_features(output, made)
    facts = {"file": str(output), "tokens": len(x), "neurons": x.shape[1], "features": components,
             "sweeps": estimator.n_iter_, "relative_error": estimator.relative_error_}  # fmt: skip
    if as_json:
        print_json(facts)
        return
    print(f"{output}: {components} features of {x.shape[1]} neurons from {len(x)} tokens, {estimator.n_iter_} sweeps, "
          f"relative error {estimator.relative_error_:.3f}")  # fmt: skip


@app.command()
def inspect(
    model: Model,
    features: File,
    feature: Feature = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens, words and neurons to show.")] = 10,
    final_norm: Annotated[
        bool, typer.Option("--final-norm", help="Scale by the model's last norm before the output words.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Print what features are about: tokens that use them most, words they raise, neurons. All of them, a line each, or
    one in full."""
    use_threads(threads)
    held = read(features)
    module, tokenizer = open_model(model_path(model))
    chosen = range(len(held.components)) if feature is None else [feature]
    found = [describe(module, tokenizer, held, one, top, final_norm) for one in chosen]
    if as_json:
        print_json(found)
    elif feature is None:
        print("\n".join(f"{one['feature']:4d}  {words(one['tokens'])}  ->  {words(one['raised'])}" for one in found))
    else:
        print("\n".join(in_full(found[0])))


@app.command()
def steer(
    model: Model,
    features: File,
    feature: Annotated[int, typer.Option("--feature", min=0, help="Which feature.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Beginning of the text.")] = "I think that",
    kl: Annotated[float, typer.Option("--kl", help="How far to move the next token's distribution, nat.")] = 0.25,
    negative: Annotated[bool, typer.Option("--negative", help="Suppress the feature instead.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate with a feature added to its layer, at the strength that moves the next token by a given KL."""
    from tilewright.inspect.snmf.steering import find_alpha_for_kl
    from tilewright.inspect.snmf.steering import steer as steered

    use_threads(threads)
    held = read(features)
    module, tokenizer = open_model(model_path(model))
    layer, vector = held.info["layer"], component(held, feature)
    strength = find_alpha_for_kl(module, tokenizer, layer, vector, kl, prompts=[prompt], negative=negative)
    if not strength.reached:
        raise ValueError(f"--kl {kl}: the nearest that feature {feature} reaches is {strength.kl:.3g}")
    plain = sample(module, tokenizer, prompt, tokens, seed)
    with steered(module, layer, vector, strength.alpha):
        changed = sample(module, tokenizer, prompt, tokens, seed)
    if as_json:
        print_json({"feature": feature, "alpha": strength.alpha, "kl": strength.kl, "plain": plain, "steered": changed})
        return
    print(f"feature {feature}, alpha {strength.alpha:.3g}, KL {strength.kl:.3g}")
    print(f"plain:   {plain}\nsteered: {changed}")


@app.command()
def tree(
    features: File,
    min_weight: Annotated[
        float, typer.Option("--min-weight", min=0, max=1, help="Least share of the parent's largest weight.")
    ] = 0.5,
    as_json: Json = False,
) -> None:
    """Print which features of each level hold which of the level below."""
    from dataclasses import asdict

    held = read(features)
    if not held.upper:
        raise ValueError(f"{features} has one level; fit it with --upper for a tree")
    edges = edges_of(held, min_weight)
    if as_json:
        print_json([asdict(edge) for edge in edges])
        return
    lines: dict[tuple[int, int], list[str]] = {}
    for edge in edges:
        lines.setdefault((edge.level, edge.parent), []).append(f"{edge.child} ({edge.weight:.2f})")
    print("\n".join(f"level {level}, feature {parent}: {', '.join(some)}" for (level, parent), some in lines.items()))


def open_model(path: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    from tilewright.models import load, to_transformers

    loaded = load(path)
    if loaded.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; features are named by tokens, so one is needed")
    return to_transformers(loaded, dequantize=True), loaded.tokenizer


def texts_of(name: str, limit: int) -> list[str]:
    """The sentences of the concepts, the paragraphs of a corpus, or the lines of a file."""
    from tilewright.data import CORPORA, corpus
    from tilewright.data.concepts import concepts

    if name == "concepts":
        return [text for one in concepts() for text in one.sentences][:limit]
    body = corpus(name, "calibration") if name in CORPORA else read_text(Path(name).expanduser(), "--text")
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--text {name} holds no text; one text a line is needed")
    return lines[:limit]


def read(path: Path) -> FeatureSet:
    """The features of a file, with the tokens that `inspect` needs."""
    from tilewright.inspect.snmf.storage import load_features

    return load_features(path)


def component(held: FeatureSet, feature: int) -> Any:
    """One feature [d]; an unknown number is a ValueError."""
    if feature >= len(held.components):
        raise ValueError(f"--feature {feature}: the file has features 0 to {len(held.components) - 1}")
    return held.components[feature]


def describe(module: Any, tokenizer: Any, held: FeatureSet, feature: int, top: int, final_norm: bool) -> dict[str, Any]:
    """What `inspect --json` prints of one feature."""
    from tilewright.inspect.snmf.interpret import feature_neurons, top_tokens, vocab_projection

    vector = component(held, feature)
    seen = [] if held.coefficients is None or held.index is None else top_tokens(
        held.coefficients, held.index, feature, count=top
    )  # fmt: skip
    lens = vocab_projection(module, held.info["layer"], vector, top=top, final_norm=final_norm)
    return {
        "feature": feature,
        "tokens": [tokenizer.decode([one.token]) for one in seen],
        "contexts": [{"text": one.text(tokenizer), "coefficient": one.coefficient} for one in seen],
        "raised": [tokenizer.decode([token]) for token, _ in lens.raised],
        "lowered": [tokenizer.decode([token]) for token, _ in lens.lowered],
        "neurons": [{"neuron": neuron, "weight": weight} for neuron, weight in feature_neurons(vector)[:top]],
    }


def words(some: list[str]) -> str:
    """Distinct words of a list on one line."""
    return " ".join(dict.fromkeys(repr(one.strip())[1:-1] for one in some if one.strip()))


def in_full(found: dict[str, Any]) -> list[str]:
    """Lines of `inspect --feature`."""
    lines = [f"feature {found['feature']}", "tokens that use it most:"]
    lines += [f"  {one['coefficient']:8.4f}  {one['text']!r}" for one in found["contexts"]]
    lines += [f"raises:  {words(found['raised'])}", f"lowers:  {words(found['lowered'])}"]
    return [*lines, "neurons: " + ", ".join(f"{one['neuron']} ({one['weight']:+.3g})" for one in found["neurons"])]


def edges_of(held: FeatureSet, min_weight: float) -> list[Any]:
    """The edges of a stored tree."""
    from tilewright.inspect.snmf.hierarchy import edges_between

    found = []
    for number, (_, weights) in enumerate(held.upper, 2):
        found += edges_between(weights.numpy(), number, min_weight)
    return found


def sample(module: Any, tokenizer: Any, prompt: str, tokens: int, seed: int) -> str:
    """Text that the model writes, sampled as the paper does (top 30, 0.3 of the probability)."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    out = module.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=30, top_p=0.3, max_new_tokens=tokens,
        pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


VERBS = {"snmf": app}
