# SPDX-License-Identifier: Apache-2.0
"""Runs in a peer's environment: one matrix product of its ggml library, timed on request.

Arguments: one JSON object with `folder` (x.npy float32 [M, K], w.npy float32 [N, K]; y.npy is written there), `type`
(the number of a ggml type), `copies` and `threads`. After "ready" each line read from standard input computes the
product with every copy of the weight in one graph and answers with its nanoseconds for one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np

FLOAT32 = 0
SPARE = 64 << 20


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Library:
    """The functions of whichever ggml libraries the package brings; newer ones are split into several."""

    def __init__(self, package: str) -> None:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed")
        folder = Path(spec.origin).parent / "lib"
        order = ("libggml-base.so", "libggml-cpu*.so", "libggml.so")
        names = [str(found) for part in order for found in sorted(folder.glob(part + "*"))]
        if not names:
            raise SystemExit(f"{package} brings no ggml library in {folder}")
        self.libraries = [ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL) for name in names]

    def __call__(self, name: str, result: type | None, *arguments: type) -> ctypes._CFuncPtr:
        for library in self.libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                return function
        raise SystemExit(f"no {name} in {[lib._name for lib in self.libraries]}")


class Product:
    """A graph of `copies` products of the same activations, each with its own copy of the weight."""

    def __init__(self, library: Library, request: dict) -> None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        x, w = (np.load(Path(request["folder"]) / name) for name in ("x.npy", "w.npy"))
        (m, k), n = x.shape, w.shape[0]
        new = library("ggml_new_tensor_2d", pointer, pointer, integer, ctypes.c_int64, ctypes.c_int64)
        data = library("ggml_get_data", pointer, pointer)
        nbytes = library("ggml_nbytes", size, pointer)
        quantize = library("ggml_quantize_chunk", size, integer, pointer, pointer, *[ctypes.c_int64] * 3, pointer)
        row_size = library("ggml_row_size", size, integer, ctypes.c_int64)
        self.weight_bytes = row_size(request["type"], k) * n
        self.copies = request["copies"]
        self.memory = (self.weight_bytes + 4 * m * n) * self.copies + 4 * m * k + SPARE
        self.free = library("ggml_free", None, pointer)
        self.init = library("ggml_init", pointer, InitParams)
        self.context = self.init(InitParams(self.memory, None, False))
        activations = new(self.context, FLOAT32, k, m)
        ctypes.memmove(data(activations), x.ctypes.data, x.nbytes)
        multiply = library("ggml_mul_mat", pointer, pointer, pointer, pointer)
        expand = library("ggml_build_forward_expand", None, pointer, pointer)
        self.graph = library("ggml_new_graph", pointer, pointer)(self.context)
        first = None
        for _ in range(self.copies):
            weight = new(self.context, request["type"], k, n)
            assert nbytes(weight) == self.weight_bytes
            if first is None:
                quantize(request["type"], w.ctypes.data, data(weight), 0, n, k, None)
                first, self.output = weight, None
            else:
                ctypes.memmove(data(weight), data(first), self.weight_bytes)
            product = multiply(self.context, weight, activations)
            self.output = self.output or product
            expand(self.graph, product)
        self.threads, self.shape, self.data = request["threads"], (m, n), data
        # Its work buffer is taken from the context each time: a context of its own is freed after each call.
        self.compute = library("ggml_graph_compute_with_ctx", integer, pointer, pointer, integer)

    def run(self) -> int:
        """Nanoseconds of one product."""
        scratch = self.init(InitParams(SPARE, None, False))
        start = time.perf_counter_ns()
        code = self.compute(scratch, self.graph, self.threads)
        took = time.perf_counter_ns() - start
        self.free(scratch)
        if code:
            raise SystemExit(f"ggml_graph_compute ended with {code}")
        return took // self.copies

    def result(self) -> np.ndarray:
        """Of the first copy, [M, N]."""
        m, n = self.shape
        at = ctypes.cast(self.data(self.output), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(at, (m, n)).copy()


def main() -> None:
    """Answer requests until standard input ends."""
    sys.path.pop(0)  # the folder of this file, where modules have their peers' names
    package, request = sys.argv[1], json.loads(sys.argv[2])
    library = Library(package)
    if any(hasattr(part, "ggml_cpu_init") for part in library.libraries):
        library("ggml_cpu_init", None)()
    product = Product(library, request)
    product.run()
    np.save(Path(request["folder"]) / "y.npy", product.result())
    print("ready", product.weight_bytes, flush=True)
    for _ in sys.stdin:
        print(product.run(), flush=True)


if __name__ == "__main__":
    main()
