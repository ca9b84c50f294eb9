# SPDX-License-Identifier: Apache-2.0
"""SAEs on disk as SAELens writes them: ``cfg.json`` beside ``sae_weights.safetensors``.

Tensors: ``W_enc`` [d, m], ``W_dec`` [m, d], ``b_enc`` [m], ``b_dec`` [d], and ``threshold`` [m] of a JumpReLU SAE. A
BatchTopK SAE is written as what it is at inference, a JumpReLU SAE with one threshold; ``metadata`` remembers the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright._files import atomic_directory
from tilewright.inspect.sae.module import KINDS, SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OURS = "tilewright"


def save_sae(sae: SAE, directory: str | os.PathLike[str]) -> None:
    """Write an SAE; the folder appears complete or not at all.

    Raises:
        FileExistsError: the folder exists and holds no SAE.
    """
    from safetensors.torch import save_file

    target = Path(directory)
    if target.exists() and not (target / CONFIG).is_file():
        raise FileExistsError(f"{target} exists and holds no SAE ({CONFIG} is missing); name another folder")
    settings = sae.settings()
    config = {
        "architecture": "topk" if isinstance(sae, TopKSAE) else "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, OURS: {"kind": sae.kind, "settings": settings}},
    }
    if isinstance(sae, TopKSAE):
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    with atomic_directory(target) as folder:
        save_file({name: t.float().contiguous() for name, t in _tensors(sae).items()}, str(folder / WEIGHTS))
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _tensors(sae: SAE) -> dict[str, Tensor]:
    named = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae, JumpReLUSAE):
        named["threshold"] = sae.threshold
    elif isinstance(sae, BatchTopKSAE):
        named["threshold"] = sae.threshold.expand(sae.width)
    return {name: tensor.detach() for name, tensor in named.items()}


def load_sae(path: str | os.PathLike[str], *, k: int | None = None) -> SAE:
    """An SAE in evaluation mode, from a folder (ours or SAELens') or a plain safetensors file with the tensors' names.

    Architectures: topk, jumprelu, and standard (ReLU: thresholds of 0). Without a ``cfg.json`` beside it the file is
    taken as JumpReLU where it has a ``threshold``, as TopK where ``k`` is given, and as standard otherwise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor is missing or of another shape, or the architecture or normalisation is not read here.
    """
    place = Path(path)
    file = place / WEIGHTS if place.is_dir() else place
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; an SAE's folder or safetensors file is needed")
    beside = file.with_name(CONFIG)
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    tensors = _read(file)
    sae = _empty(file, config, tensors, k)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(tensors[name].T if name == "W_enc" else tensors[name])
        if isinstance(sae, JumpReLUSAE):
            sae.log_threshold.copy_(tensors.get("threshold", torch.zeros(sae.width)).float().log())
        elif isinstance(sae, BatchTopKSAE):
            sae.threshold.copy_(tensors["threshold"][0])
        if config.get("rescale_acts_by_decoder_norm"):
            norm = sae.W_dec.norm(dim=1)
            sae.W_enc.mul_(norm[:, None])
            sae.b_enc.mul_(norm)
            sae.normalize_decoder()
    return sae.eval()


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except SafetensorError as wrong:
        raise ValueError(f"{file}: not a safetensors file ({wrong})") from wrong
    if missing := [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]:
        raise ValueError(f"{file}: tensor {missing[0]} is missing; it holds {', '.join(sorted(tensors))}")
    d, m = tensors["W_enc"].shape if tensors["W_enc"].dim() == 2 else (0, 0)
    shapes = {"W_enc": [d, m], "W_dec": [m, d], "b_enc": [m], "b_dec": [d], "threshold": [m]}
    for name, shape in shapes.items():
        if name in tensors and list(tensors[name].shape) != shape:
            raise ValueError(f"{file}: {name} has shape {list(tensors[name].shape)}, {shape} is needed beside W_enc")
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{file}: {name} holds NaN or infinite values; the file is damaged")
    return tensors


def _empty(file: Path, config: dict[str, Any], tensors: dict[str, Tensor], k: int | None) -> SAE:
    d, m = tensors["W_enc"].shape
    guess = "jumprelu" if "threshold" in tensors else "standard" if k is None else "topk"
    architecture = config.get("architecture", guess)
    if architecture not in ("topk", "jumprelu", "standard"):
        raise ValueError(f"{file}: architecture {architecture!r} is not read here; need topk, jumprelu or standard")
    normalization = config.get("normalize_activations", "none")
    if normalization not in ("none", None):
        raise ValueError(
            f"{file}: normalize_activations is {normalization!r}; fold it into the weights where the SAE was made"
        )
    known = {key: value for key, value in config.get("metadata", {}).items() if key != OURS}
    common: dict[str, Any] = {"metadata": known, "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True))}
    ours = config.get("metadata", {}).get(OURS, {})
    if ours:
        return KINDS[ours["kind"]](d, m, **{**ours["settings"], **common})
    if architecture == "topk":
        k = k or config.get("k") or config.get("activation_fn_kwargs", {}).get("k")
        if not k:
            raise ValueError(f"{file}: a TopK SAE without k; pass load_sae(path, k=...)")
        return TopKSAE(d, m, int(k), **common)
    if architecture == "jumprelu" and "threshold" not in tensors:
        raise ValueError(f"{file}: a JumpReLU SAE without threshold; its file is incomplete")
    return JumpReLUSAE(d, m, **common)
