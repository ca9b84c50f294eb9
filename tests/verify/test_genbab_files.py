# SPDX-License-Identifier: Apache-2.0
"""ONNX and VNN-LIB files made here, with known verdicts; the command line in VNN-COMP's words."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.verify.genbab import UnsupportedOperator, load_onnx, verify_files, vnnlib


def save(path, nodes, weights, n_in, n_out, opset=17, shape=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [1, n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, n_out])],
        [
            numpy_helper.from_array(np.asarray(w, dtype=w.dtype if hasattr(w, "dtype") else np.float32), k)
            for k, w in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def mlp(path, op="Relu", seed=0, sizes=(2, 8, 8, 2)):
    rng = np.random.default_rng(seed)
    nodes, weights, name = [], {}, "x"
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{i}"] = rng.standard_normal((b, a)).astype(np.float32) / np.float32(a**0.5)
        weights[f"b{i}"] = rng.standard_normal(b).astype(np.float32) * np.float32(0.3)
        last = i == len(sizes) - 2
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], ["y" if last else f"h{i}"], transB=1))
        if not last:
            nodes.append(helper.make_node(op, [f"h{i}"], [f"a{i}"]))
        name = f"a{i}"
    save(path, nodes, weights, sizes[0], sizes[-1])

    def forward(x):
        # The plain forward pass, in the model's precision.
        for i in range(len(sizes) - 1):
            x = torch.nn.functional.linear(x, torch.from_numpy(weights[f"w{i}"]), torch.from_numpy(weights[f"b{i}"]))
            x = getattr(torch, op.lower())(x) if i < len(sizes) - 2 else x
        return x

    return forward


def spec(condition, n_in=2, n_out=2, low=-1.0, high=1.0):
    lines = [f"(declare-const X_{i} Real)" for i in range(n_in)] + [f"(declare-const Y_{i} Real)" for i in range(n_out)]
    for i in range(n_in):
        lines += [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
    return "\n".join([*lines, f"(assert {condition})"])


@pytest.fixture
def files(tmp_path):
    def make(condition, op="Relu", **how):
        forward = mlp(tmp_path / "m.onnx", op)
        (tmp_path / "p.vnnlib").write_text("; unsafe\n" + spec(condition, **how))
        x = -1 + 2 * torch.rand((100000, 2))
        x[:4] = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        return tmp_path / "m.onnx", tmp_path / "p.vnnlib", forward, forward(x)

    return make


@pytest.mark.parametrize("op", ["Relu", "Tanh", "Sigmoid"])
def test_known_verdicts(files, op):
    _, _, _, y = files("(<= Y_0 Y_1)", op)
    least = float((y[:, 0] - y[:, 1]).min())
    spread = float((y[:, 0] - y[:, 1]).max()) - least
    model, prop, _, _ = files(f"(<= (- Y_0 Y_1) {least - 0.05 * spread})", op)
    assert verify_files(model, prop, timeout=60, split="input").word == "unsat"
    model, prop, forward, _ = files(f"(<= (- Y_0 Y_1) {least + 0.05 * spread})", op)
    answer = verify_files(model, prop, timeout=60)
    assert answer.word == "sat"
    out = forward(answer.x.float()[None])[0]
    assert float(out[0] - out[1]) <= least + 0.05 * spread
    assert torch.allclose(out.double(), answer.y, atol=1e-6)
    assert (answer.x.abs() <= 1).all()


def test_disjunctions_boxes_and_conjunctions(files):
    _, _, _, y = files("(<= Y_0 0)")
    low, high = float(y[:, 0].min()), float(y[:, 0].max())
    # Unsafe only far outside the range: proved in both boxes.
    above = f"(or (>= Y_0 {high + 1}) (and (>= Y_0 {high + 1}) (<= Y_1 0)))"
    text = f"(or (and (<= X_0 0) (<= Y_0 {low - 1})) (and (>= X_0 0) {above}))"
    model, prop, _, _ = files(text)
    sets = vnnlib.read(prop)
    assert len(sets) == 2
    assert sets[0].x_U.tolist() == [0.0, 1.0]
    assert sets[1].x_L.tolist() == [0.0, -1.0]
    assert verify_files(model, prop, timeout=60).word == "unsat"
    text = f"(or (and (<= X_0 0) (<= Y_0 {low - 1})) (and (>= X_0 0) (<= Y_0 {high + 1})))"
    model, prop, _, _ = files(text)
    answer = verify_files(model, prop, timeout=60)
    assert answer.word == "sat"
    assert float(answer.x[0]) >= 0


def test_the_command_prints_the_words_of_vnn_comp(files, tmp_path):
    model, prop, forward, y = files("(<= Y_0 1000)")
    done = CliRunner().invoke(app, ["verify", str(model), str(prop), "--timeout", "30", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "sat"
    found = dict(re.findall(r"\(([XY]_\d) ([^()]+)\)", done.stdout))
    x = torch.tensor([[float(found["X_0"]), float(found["X_1"])]])
    assert float(found["Y_0"]) == pytest.approx(float(forward(x)[0, 0]), abs=1e-5)
    assert (tmp_path / "out").read_text() == done.stdout
    model, prop, _, _ = files("(<= Y_0 -1000)")
    done = CliRunner().invoke(app, ["verify", str(model), str(prop), "--json"])
    assert json.loads(done.stdout)["result"] == "unsat"
    least = float(y[:, 0].min())
    model, prop, _, _ = files(f"(<= Y_0 {least - 1e-2})")
    done = CliRunner().invoke(app, ["verify", str(model), str(prop), "--timeout", "0.05"])
    assert done.stdout.strip() in ("timeout", "unsat")


VERSION_2 = """(vnnlib-version <2.0>)
(declare-network n (declare-input X Real [1,2]) (declare-output Y Real [1, 2]))
(assert (and (<= X[0,0] 1.0) (>= X[0,0] -1.0)))
(assert (<= X[0, 1] 0.5)) (assert (>= X[0,1] -5e-1))
(assert (or (and (<= Y[0,0] 2.0)) (and (>= (+ Y[0,0] (* 2.0 Y[0,1])) 3.0))))
"""


def test_version_2_and_linear_sums():
    (one,) = vnnlib.parse(VERSION_2)
    assert one.x_L.tolist() == [-1.0, -0.5]
    (a, b), (c, d) = one.rows
    assert (a.tolist(), b.tolist()) == ([[1.0, 0.0]], [2.0])
    assert (c.tolist(), d.tolist()) == ([[-1.0, -2.0]], [-3.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "declares no inputs"),
        ("(declare-const X_0 Real)(declare-const Y_0 Real)", "asserts nothing"),
        ("(declare-const X_0 Real", "ends inside"),
        ("(declare-const Z_0 Real)", "X_0"),
        (spec("(<= Y_2 0)"), "not declared"),
        (spec("(<= Y_0 abc)"), "number"),
        (spec("(<= (* Y_0 Y_1) 0)"), "linear"),
        (spec("(<= X_0 Y_1)"), "inputs and outputs"),
        (spec("(<= (+ X_0 X_1) 0)"), "several inputs"),
        (spec("(not (<= Y_0 0))"), "condition"),
        ("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1))(assert (<= Y_0 1))", "without a lower"),
        (spec("(<= Y_0 nan)"), "finite"),
        ("(define-fun f)", "not read"),
    ],
)
def test_bad_property_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        vnnlib.parse(text)


node = helper.make_node


def ints(*values):
    return np.array(values)


def convolution():
    yield node("Reshape", ["x", "s"], ["i"])
    yield node("Conv", ["i", "k", "b"], ["c"], pads=[1, 0, 1, 1], strides=[2, 1])
    yield node("Flatten", ["c"], ["f"])
    yield node("MatMul", ["f", "m"], ["y"])


def pools():
    yield node("Reshape", ["x", "s"], ["i"])
    yield node("MaxPool", ["i"], ["p"], kernel_shape=[2, 2])
    yield node("AveragePool", ["p"], ["q"], kernel_shape=[2, 1])
    yield node("Flatten", ["q"], ["y0"])
    yield node("Concat", ["y0", "y0"], ["y1"], axis=1)
    yield node("Slice", ["y1", "st", "en", "ax", "sp"], ["y"])


def softmax():
    yield node("Softmax", ["x"], ["p"])
    yield node("Gather", ["p", "g"], ["y"], axis=1)


def arithmetic():
    yield node("Exp", ["x"], ["e"])
    yield node("Add", ["e", "one"], ["f"])
    yield node("Log", ["f"], ["l"])
    yield node("Sqrt", ["f"], ["q"])
    yield node("Div", ["l", "q"], ["d"])
    yield node("Pow", ["d", "two"], ["p"])
    yield node("Neg", ["p"], ["n"])
    yield node("Abs", ["n"], ["a"])
    yield node("Sub", ["a", "x"], ["u"])
    yield node("Mul", ["u", "x"], ["v"])
    yield node("Reciprocal", ["f"], ["r"])
    yield node("Add", ["v", "r"], ["z"])
    yield node("MatMul", ["z", "m"], ["y"])


def functions():
    yield node("Sin", ["x"], ["a"])
    yield node("Cos", ["a"], ["b"])
    yield node("Tanh", ["b"], ["c"])
    yield node("LeakyRelu", ["c"], ["d"], alpha=0.2)
    yield node("Sigmoid", ["d"], ["e"])
    yield node("Clip", ["e", "lo", "hi"], ["f"])
    yield node("Unsqueeze", ["f", "ax"], ["g"])
    yield node("Transpose", ["g"], ["h"], perm=[0, 2, 1])
    yield node("ReduceSum", ["h", "ax2"], ["i"], keepdims=0)
    yield node("Identity", ["i"], ["j"])
    yield node("MatMul", ["j", "m"], ["y"])


def norms():
    yield node("Reshape", ["x", "s"], ["i"])
    yield node("BatchNormalization", ["i", "w", "b", "mu", "va"], ["n"])
    yield node("ReduceMean", ["n"], ["y"], axes=[2], keepdims=0)


def bilinear():
    yield node("Reshape", ["x", "s"], ["q"])
    yield node("Transpose", ["q"], ["k"], perm=[0, 2, 1])
    yield node("MatMul", ["q", "k"], ["w"])
    yield node("Flatten", ["w"], ["f"])
    yield node("MatMul", ["f", "m"], ["y"])


OPERATORS = {
    convolution: {"s": ints(1, 1, 4, 3), "k": "2 1 3 2", "b": "2", "m": "12 3"},
    pools: {"s": ints(1, 1, 4, 3), "st": ints(0), "en": ints(3), "ax": ints(1), "sp": ints(1)},
    softmax: {"g": ints(3, 0, 7)},
    arithmetic: {"one": np.float32(1.0), "two": np.float32(2.0), "m": "12 3"},
    functions: {"lo": np.float32(0.1), "hi": np.float32(0.9), "ax": ints(2), "ax2": ints(1), "m": "12 3"},
    norms: {"s": ints(1, 3, -1), "w": "3", "b": "3", "mu": "3", "va": np.array([0.5, 1, 2], dtype=np.float32)},
    bilinear: {"s": ints(1, 3, 4), "m": "9 3"},
}


@pytest.mark.parametrize("nodes", OPERATORS)
def test_operators_are_read_as_onnx_evaluates_them(nodes, tmp_path):
    weights = OPERATORS[nodes]
    rng = np.random.default_rng(1)
    made = {
        name: rng.standard_normal([int(n) for n in w.split()]).astype(np.float32) if isinstance(w, str) else w
        for name, w in weights.items()
    }
    path = save(tmp_path / "m.onnx", list(nodes()), made, 12, 3)
    graph, model = load_onnx(path)
    from tilewright.verify.genbab import BoundedModule, BoundedTensor, PerturbationLpNorm, from_onnx

    x = torch.randn(12, dtype=torch.float64)
    assert torch.allclose(graph.forward(x[None])[0], from_onnx.evaluate(model, x), atol=1e-4)
    bounded = BoundedTensor(x[None], PerturbationLpNorm(eps=0.1))
    lower, upper = BoundedModule(graph).compute_bounds(x=(bounded,))
    near = x + 0.1 * (2 * torch.rand((500, 12), dtype=torch.float64) - 1)
    y = graph.forward(near)
    assert ((y >= lower.reshape(-1) - 1e-9) & (y <= upper.reshape(-1) + 1e-9)).all()


def test_damaged_files_and_unknown_operators_are_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01not a model")
    with pytest.raises(ValueError, match="not a valid ONNX"):
        load_onnx(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "none.onnx")
    path = save(tmp_path / "h.onnx", [helper.make_node("HardSwish", ["x"], ["y"], name="odd")], {}, 3, 3)
    with pytest.raises(UnsupportedOperator, match=r"odd.*HardSwish"):
        load_onnx(path)
    nan = {"m": np.full((3, 3), np.nan, dtype=np.float32)}
    path = save(tmp_path / "n.onnx", [helper.make_node("MatMul", ["x", "m"], ["y"])], nan, 3, 3)
    with pytest.raises(ValueError, match="NaN"):
        load_onnx(path)


def test_a_property_of_other_sizes_is_refused(tmp_path):
    mlp(tmp_path / "m.onnx")
    (tmp_path / "p.vnnlib").write_text(spec("(<= Y_0 0)", n_in=3))
    with pytest.raises(ValueError, match="3 inputs"):
        verify_files(tmp_path / "m.onnx", tmp_path / "p.vnnlib")
