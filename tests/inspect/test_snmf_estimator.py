# SPDX-License-Identifier: Apache-2.0
"""SemiNMF and HierarchicalSemiNMF as estimators: scikit-learn's own checks, oracles, parameters, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from tilewright.inspect.snmf import HierarchicalSemiNMF, SemiNMF, feature_set, load_features, save_features

SMALL = {"n_components": 2, "max_iter": 20, "dtype": "float64"}


@parametrize_with_checks([SemiNMF(**SMALL), HierarchicalSemiNMF((2, 1), max_iter=20, dtype="float64")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scikit_learn_accepts_the_estimator(estimator, check):
    check(estimator)


def planted(seed, tokens=600, width=120, features=6, neurons=6):
    random = np.random.default_rng(seed)
    z = np.zeros((features, width))
    for row in z:
        row[random.permutation(width)[:neurons]] = random.standard_normal(neurons)
    y = abs(random.standard_normal((tokens, features)))
    return y @ z + 0.01 * random.standard_normal((tokens, width)), z


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_features_are_found(seed):
    x, z = planted(seed)
    fitted = [SemiNMF(6, sparsity=0.05, max_iter=400, random_state=start).fit(x) for start in range(4)]
    model = min(fitted, key=lambda one: one.reconstruction_err_)  # a single start may end in a local minimum
    assert (np.count_nonzero(model.components_, axis=1) <= 6).all()
    found = model.components_ / np.linalg.norm(model.components_, axis=1, keepdims=True)
    likeness = abs(found @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T)
    rows, columns = linear_sum_assignment(-likeness)
    # Noise of 0.01 on 600 tokens turns a feature of norm about 2 by far less than 1e-2.
    assert likeness[rows, columns].min() > 0.98
    assert model.relative_error_ == pytest.approx(model.reconstruction_err_ / np.linalg.norm(x))


def test_new_coefficients_are_those_of_least_squares():
    x, _ = planted(3)
    model = SemiNMF(8, sparsity=0.1, max_iter=60, dtype="float64").fit(x[:400])
    some, basis = x[400:], model.components_.T
    y = model.transform(some)
    assert (y >= 0).all()
    ours = ((some - model.inverse_transform(y)) ** 2).sum()
    least = sum(nnls(basis, row)[1] ** 2 for row in some)
    assert least <= ours <= 1.01 * least


@pytest.mark.parametrize("init", ["random", "svd", "kmeans"])
def test_every_start_and_fit_transform(init):
    x, _ = planted(4)
    model = SemiNMF(6, init=init, sparsity=0.05, max_iter=80, random_state=2)
    y = model.fit_transform(x)
    assert y.shape == (600, 6)
    assert y.dtype == np.float32
    assert np.linalg.norm(x - model.inverse_transform(y)) < 0.9 * np.linalg.norm(x)
    assert np.array_equal(y, clone(model).fit_transform(x))


def test_given_start_and_its_errors():
    x, _ = planted(5)
    start = np.ones((600, 6)) + np.random.default_rng(0).random((600, 6))
    assert SemiNMF(6, init=start, max_iter=5).fit(x).n_iter_ == 5
    for wrong in (start[:10], -start, start[:, :2]):
        with pytest.raises(ValueError, match=r"init has shape .*\[600, 6\]"):
            SemiNMF(6, init=wrong, max_iter=5).fit(x)


def test_tensors_arrays_blocks_and_strides_agree():
    x = planted(6)[0].astype(np.float32)
    model = SemiNMF(6, sparsity=0.05, max_iter=30).fit(x)
    tensor = torch.from_numpy(x)
    wide = torch.zeros(600, 240)
    wide[:, ::2] = tensor
    for other in (tensor, wide[:, ::2], tensor.double(), x[::-1][::-1]):
        again = SemiNMF(6, sparsity=0.05, max_iter=30).fit(other)
        assert np.array_equal(again.components_, model.components_)
    assert isinstance(model.transform(tensor), torch.Tensor)
    assert np.array_equal(model.transform(tensor).numpy(), model.transform(x))
    blocks = SemiNMF(6, sparsity=0.05, max_iter=30, dtype="float64").fit([tensor[:100], tensor[100:]])
    whole = SemiNMF(6, sparsity=0.05, max_iter=30, dtype="float64").fit(tensor)
    np.testing.assert_allclose(blocks.components_, whole.components_, rtol=1e-6, atol=1e-6)
    assert SemiNMF(6, max_iter=2).fit(tensor.to(torch.bfloat16)).components_.dtype == np.float32


def test_zeros_are_factorised_into_zeros():
    model = SemiNMF(3, max_iter=10).fit(np.zeros((5, 4)))
    assert model.reconstruction_err_ == 0
    assert model.relative_error_ == 0
    assert not model.components_.any()
    assert np.isfinite(model.transform(np.zeros((2, 4)))).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_components": 0}, "n_components=0"),
        ({"n_components": 2.5}, "n_components=2.5"),
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"patience": -1}, "patience=-1"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"reg": float("nan")}, "reg=nan"),
        ({"init": "ica"}, "init='ica'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_parameters_out_of_range_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        SemiNMF(**{"n_components": 2, **wrong}).fit(np.ones((4, 3)))


@pytest.mark.parametrize(
    "x", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 4), [torch.ones(2, 3), torch.ones(2, 4)]]
)
def test_input_of_a_wrong_shape_is_refused(x):
    with pytest.raises(ValueError, match="X has"):
        SemiNMF(1).fit(x)


def test_more_features_than_tokens_is_a_warning():
    with pytest.warns(UserWarning, match="more features than can differ"):
        SemiNMF(9, max_iter=3).fit(np.random.default_rng(0).random((4, 30)))
    with pytest.raises(ValueError, match="one piece"):
        SemiNMF(2, init="kmeans").fit([torch.ones(4, 3)])


def test_kept_neurons_is_the_share_rounded_up():
    model = SemiNMF(1, sparsity=0.07, max_iter=2).fit(np.random.default_rng(0).standard_normal((50, 100)))
    assert np.count_nonzero(model.components_) == 7
    tiny = SemiNMF(1, sparsity=1e-6, max_iter=2).fit(np.random.default_rng(0).standard_normal((50, 100)))
    assert np.count_nonzero(tiny.components_) == 1


def test_refit_lowers_the_error():
    x, _ = planted(7)
    options = {"n_components": 12, "sparsity": 0.04, "max_iter": 1, "dtype": "float64"}
    assert SemiNMF(**options, refit_support=True).fit(x).loss_curve_[0] < SemiNMF(**options).fit(x).loss_curve_[0]


def test_saved_estimator_transforms_alike(tmp_path):
    x, _ = planted(8)
    model = SemiNMF(6, sparsity=0.05, max_iter=20).fit(x)
    model.save(tmp_path / "a.safetensors", layer=3)
    again = SemiNMF.load(tmp_path / "a.safetensors")
    assert np.array_equal(again.transform(x), model.transform(x))
    assert again.get_params() == model.get_params()
    assert again.loss_curve_ == model.loss_curve_
    assert load_features(tmp_path / "a.safetensors").info["layer"] == 3


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_features(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not one")
    with pytest.raises(ValueError, match="no readable file"):
        SemiNMF.load(tmp_path / "bad")
    from safetensors.torch import save_file

    save_file({"components": torch.ones(2, 3)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="format"):
        load_features(tmp_path / "other")
    good = feature_set(SemiNMF(2, max_iter=2).fit(np.random.default_rng(0).random((9, 5))), np.ones((9, 3)))
    save_features(tmp_path / "wrong", good)
    with pytest.raises(ValueError, match="do not fit"):
        load_features(tmp_path / "wrong")


def test_hierarchy_levels_multiply_and_carry_coefficients():
    x, _ = planted(9)
    model = HierarchicalSemiNMF((8, 4, 2), sparsity=0.2, max_iter=60, dtype="float64").fit(x)
    assert [level.components.shape for level in model.levels_] == [(8, 120), (4, 120), (2, 120)]
    assert model.levels_[0].weights is None
    for below, level in zip(model.levels_, model.levels_[1:], strict=False):
        assert (level.weights >= 0).all()
        error = np.linalg.norm(below.components - level.weights.T @ level.components)
        assert error == pytest.approx(level.estimator.reconstruction_err_, rel=1e-8)
    first = model.transform(x, level=1)
    np.testing.assert_allclose(model.transform(x), first @ model.levels_[1].weights.T @ model.levels_[2].weights.T)
    assert model.transform(torch.from_numpy(x), level=2).shape == (600, 4)
    with pytest.raises(ValueError, match="level=4"):
        model.transform(x, level=4)


def test_tree_edges_are_the_heavy_weights():
    x, _ = planted(10)
    model = HierarchicalSemiNMF((6, 3), max_iter=20).fit(x)
    weights = model.levels_[1].weights
    edges = model.tree(0.5)
    assert {(e.parent, e.child) for e in edges} == {
        (j, i) for j in range(3) for i in range(6) if weights[j, i] > 0.5 * weights[j].max()
    }
    assert all(e.level == 2 for e in edges)
    absolute = model.tree(float(weights.max()) * 0.9, relative=False)
    assert {(e.parent, e.child) for e in absolute} == set(map(tuple, np.argwhere(weights > weights.max() * 0.9)))
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="min_weight"):
            model.tree(wrong)


@pytest.mark.parametrize("ranks", [(), (0,), (3, 3), (2, 4)])
def test_ranks_must_fall(ranks):
    with pytest.raises(ValueError, match="ranks"):
        HierarchicalSemiNMF(ranks).fit(np.ones((5, 4)))


def test_fine_tuning_lowers_the_error_and_keeps_signs_and_neurons():
    x, _ = planted(11)
    model = HierarchicalSemiNMF((8, 4), sparsity=0.1, max_iter=40, dtype="float64").fit(x)
    neurons = model.levels_[1].components != 0
    curve = model.fine_tune(x, steps=60, learning_rate=1e-2)
    assert len(curve) == 61
    assert curve[-1] < 0.98 * curve[0]
    assert (model.levels_[1].weights >= 0).all()
    assert not (model.levels_[1].components[~neurons]).any()
    with pytest.raises(ValueError, match="two levels"):
        HierarchicalSemiNMF((3,), max_iter=2).fit(x).fine_tune(x)
