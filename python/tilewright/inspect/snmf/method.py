# SPDX-License-Identifier: Apache-2.0
"""SemiNMF: semi-nonnegative matrix factorisation with few neurons a feature, as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilewright.inspect.snmf import factorise as core
from tilewright.inspect.snmf.matrix import Activations

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as missing:
    raise ModuleNotFoundError(
        "tilewright.inspect.snmf needs scikit-learn 1.6 or newer, and scipy: pip install 'tilewright[inspect]'",
        name="sklearn",
    ) from missing

INITS = ("random", "svd", "kmeans")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Rows = Any
"""What fit and transform take: an array [n, d], a tensor [n, d], or a list of such blocks of rows."""


class SemiNMF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """X ~ Y^T Z^T with non-negative coefficients Y and signed features Z of few neurons each (arXiv 2506.10920).

    X [n, d] holds one token's MLP activation a row; the paper's A is X^T. Every sweep solves for Z, keeps the
    ``sparsity`` share of each feature's neurons that is largest, and multiplies Y by Ding, Li and Jordan's ratio.

    Parameters
    ----------
    n_components : k, how many features.
    init : "random" (the paper's), "svd", "kmeans" (one-hot plus ``init_offset``), or an array [n, k] of positive
        coefficients.
    sparsity : share p of neurons that each feature keeps, in (0, 1]; max(1, ceil(p d)) of them. 1 keeps all.
    max_iter, tol, patience : sweeps at most; stop when ``patience`` of them did not lower the least loss by more than
        the factor ``tol``.
    reg : added to the diagonal of Y Y^T, whose diagonal is about 1, when Z is solved for.
    refit_support : solve each neuron's weights again on the features that kept it. Not in the paper.
    random_state : of the start: an integer, a RandomState, or None.
    dtype : "float32" or "float64"; what is narrower is widened once. Inner products of features and of coefficients,
        the solve and the loss are in float64 always.
    transform_iter : updates of Y in :meth:`transform`.
    init_offset : see ``init``. 1e-6 is the paper's code, 0.2 Ding, Li and Jordan's advice.
    progress : a bar on standard error; None shows it on a terminal.

    Attributes
    ----------
    components_ : Z^T, array [k, d].
    reconstruction_err_ : ||X - Y^T Z^T||, Frobenius, of the best sweep, which is the one that is kept.
    relative_error_ : the same over ||X||; 0 for X = 0.
    n_iter_, loss_curve_ : sweeps, and the squared error after each.
    n_features_in_ : d.
    """

    def __init__(
        self,
        n_components: int = 100,
        init: Any = "random",
        sparsity: float = 0.01,
        max_iter: int = 2000,
        tol: float = 1e-7,
        patience: int = 100,
        reg: float = 1e-6,
        refit_support: bool = False,
        random_state: Any = 0,
        dtype: str = "float32",
        transform_iter: int = 100,
        init_offset: float = 0.2,
        progress: bool | None = False,
    ) -> None:
        self.n_components = n_components
        self.init = init
        self.sparsity = sparsity
        self.max_iter = max_iter
        self.tol = tol
        self.patience = patience
        self.reg = reg
        self.refit_support = refit_support
        self.random_state = random_state
        self.dtype = dtype
        self.transform_iter = transform_iter
        self.init_offset = init_offset
        self.progress = progress

    def fit(self, X: Rows, y: Any = None) -> SemiNMF:  # noqa: ARG002
        """Learn the features of X [n, d]: an array, a tensor (also on a GPU), or a list of blocks [n_b, d].

        Blocks are read again in every sweep, and neither they nor their reconstruction are held: give views of a
        memory-mapped file, such as ``list(store.batches(name, 8192))`` of an ActivationStore.

        Raises:
            ValueError: a parameter is out of range, or X is empty, not two-dimensional, or not finite (the first such
                row is named).
            RuntimeError: the loss is not finite after a sweep (the sweep is named).
        """
        self._fit(X)
        return self

    def fit_transform(self, X: Rows, y: Any = None) -> Any:  # noqa: ARG002
        """``fit(X).transform(X)``: the coefficients [n, k] that belong to the features that were kept."""
        return self.fit(X).transform(X)

    def _fit(self, X: Rows) -> core.Factors:
        settings = self._settings()
        data = self._activations(X, reset=True)
        if min(data.tokens, data.width) < settings.n_components:
            warnings.warn(
                f"n_components={settings.n_components} features from {data.tokens} tokens of {data.width} neurons: "
                "there are more features than can differ; lower n_components or give more tokens",
                UserWarning,
                stacklevel=3,
            )
        found = core.factorise(data, self._start(data), settings, progress=self.progress)
        self.components_ = found.components.cpu().numpy()
        self._n_features_out = len(self.components_)
        self.loss_curve_ = found.losses
        self.n_iter_ = len(found.losses)
        self.reconstruction_err_ = found.best**0.5
        self.relative_error_ = (found.best / data.squared) ** 0.5 if data.squared else 0.0
        return found

    def transform(self, X: Rows) -> Any:
        """Coefficients [n, k], not negative, of the rows of X [n, d] for the learned features.

        Each row's result depends on that row alone. A tensor gives a tensor on its device, anything else an array.
        """
        check_is_fitted(self)
        data = self._activations(X, reset=False)
        features = torch.from_numpy(self.components_).to(data.device, data.dtype)
        y = core.coefficients(features, data, self.transform_iter).T.contiguous()
        return y if _holds_tensors(X) else y.numpy()

    def inverse_transform(self, X: Any) -> Any:
        """Reconstructed activations [n, d] from coefficients X [n, k]."""
        check_is_fitted(self)
        if isinstance(X, Tensor):
            return X @ torch.from_numpy(self.components_).to(X)
        given = np.asarray(X)
        if given.ndim != 2 or given.shape[1] != len(self.components_):
            raise ValueError(f"X has shape {list(given.shape)}; coefficients [n, {len(self.components_)}] are needed")
        return given @ self.components_

    def save(self, path: Any, **info: Any) -> None:
        """Write the fitted estimator to one safetensors file; ``info`` (JSON values) is kept with it."""
        from tilewright.inspect.snmf.storage import save_estimator

        save_estimator(self, path, info)

    @classmethod
    def load(cls, path: Any) -> SemiNMF:
        """The estimator of a file that :meth:`save` or :func:`tilewright.inspect.snmf.save_features` wrote."""
        from tilewright.inspect.snmf.storage import load_estimator

        return load_estimator(path)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = [self.dtype]
        return tags

    def _settings(self) -> core.Settings:
        least = {"n_components": 1, "max_iter": 1, "patience": 0, "transform_iter": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < bound:
                raise ValueError(f"{name}={value!r}: an integer of at least {bound} is needed")
        if not 0 < self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity!r}: a share of neurons in (0, 1] is needed")
        for name in ("tol", "reg", "init_offset"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: a finite number of at least 0 is needed")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: need 'float32' or 'float64'")
        if isinstance(self.init, str) and self.init not in INITS:
            raise ValueError(f"init={self.init!r}: need {', '.join(INITS)}, or an array [n, n_components]")
        return core.Settings(
            int(self.n_components), self.sparsity, int(self.max_iter), self.tol, int(self.patience), self.reg,
            self.refit_support,
        )  # fmt: skip

    def _activations(self, X: Rows, *, reset: bool) -> Activations:
        dtype = DTYPES[self.dtype]
        if isinstance(X, Tensor) or _is_blocks(X):
            blocks = [torch.as_tensor(block) for block in (X if _is_blocks(X) else [X])]
            if any(block.dim() != 2 for block in blocks):
                raise ValueError(f"X has shape {list(blocks[0].shape)}; activations [n, d] are needed")
            validate_data(self, blocks[0], reset=reset, skip_check_array=True)
            return Activations(blocks if _is_blocks(X) else blocks[0], dtype)
        rows = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_all_finite=False)
        return Activations(torch.from_numpy(np.array(rows)), dtype)

    def _start(self, data: Activations) -> Tensor:
        k = int(self.n_components)
        if not isinstance(self.init, str):
            given = torch.as_tensor(self.init).to(data.device, data.dtype)
            if tuple(given.shape) != (data.tokens, k) or not bool((given > 0).all()):
                raise ValueError(f"init has shape {list(given.shape)}; positive values [{data.tokens}, {k}] are needed")
            return given.T.contiguous()
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        if self.init == "svd":
            return core.start_svd(k, data, seed)
        if self.init == "kmeans":
            return core.start_kmeans(k, data, seed, self.init_offset)
        return core.start_random(k, data.tokens, data, seed)


def _is_blocks(X: Any) -> bool:
    """A list of two-dimensional blocks, not a list of numbers that an array can be made from."""
    return (
        isinstance(X, Sequence) and len(X) > 0 and all(isinstance(b, (Tensor, np.ndarray)) and b.ndim == 2 for b in X)
    )


def _holds_tensors(X: Any) -> bool:
    return isinstance(X, Tensor) or (_is_blocks(X) and isinstance(X[0], Tensor))
