# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through the C functions of an installed package: `xllamacpp` (prebuilt) or `llama_cpp` (built here).

The parameter structures are passed as opaque bytes filled by the library's own defaults; only the first field of the
context parameters (`n_ctx`) is set, the threads through `llama_set_n_threads`. So one file fits library versions whose
structures grew. The cache is 16-bit, the library's default.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from .llama_family import LlamaFamily

PACKAGES = {"xllamacpp": ("xllamacpp", "*.so"), "llama_cpp": ("llama_cpp_python", "lib/libllama.so")}
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Opaque(ctypes.Structure):
    """Room for a parameter structure of any version."""

    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, ctypes.c_void_p]),
    "llama_print_system_info": (ctypes.c_char_p, []),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, Opaque]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, Opaque]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_n_ctx": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_batch_init": (Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    "llama_model_n_params": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
}


def find_package() -> str | None:
    """Import name of the llama.cpp package installed here; one built on this machine comes first."""
    return next((name for name in ("llama_cpp", "xllamacpp") if importlib.util.find_spec(name)), None)


def load_library(package: str) -> ctypes.CDLL:
    """The package's shared library with the signatures set."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in sorted(Path(folder).glob(PACKAGES[package][1]))]
    if not paths:
        raise FileNotFoundError(f"{package}: no shared library {PACKAGES[package][1]} in {list(folders)}")
    library = ctypes.CDLL(str(paths[0]))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Runner(LlamaFamily):
    """A GGUF file in llama.cpp, greedy."""

    def __init__(self, model: str, threads: int, max_length: int) -> None:
        package = find_package()
        if package is None:
            raise ModuleNotFoundError("no llama.cpp package", name="xllamacpp")
        self.package, self.api = package, load_library(package)
        self._quiet = LOG(lambda *_: None)
        self.api.llama_log_set(self._quiet, None)
        self.api.llama_backend_init()
        self.file_bytes = Path(model).stat().st_size
        self.model = self._load(model)
        self.context = self._new_context(max_length)
        self.api.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.position = 0

    def _load(self, model: str) -> int:
        handle = self.api.llama_model_load_from_file(model.encode(), self.api.llama_model_default_params())
        if not handle:
            raise ValueError(f"{model}: llama.cpp cannot load this file")
        return int(handle)

    def _new_context(self, max_length: int) -> int:
        parameters = self.api.llama_context_default_params()
        ctypes.cast(ctypes.pointer(parameters), ctypes.POINTER(ctypes.c_uint32))[0] = max_length
        context = self.api.llama_init_from_model(self.model, parameters)
        if not context or self.api.llama_n_ctx(context) < max_length:
            raise RuntimeError(
                f"llama.cpp made no context of {max_length} tokens; its parameter layout may have changed"
            )
        return int(context)

    def facts(self) -> dict[str, Any]:
        size, count = self.file_bytes, self.api.llama_model_n_params(self.model)
        version = importlib.metadata.version(PACKAGES[self.package][0])
        return {
            "bytes": size,
            "bits_per_weight": 8 * size / count,
            "library": f"{PACKAGES[self.package][0]} {version}",
            "instructions": self.api.llama_print_system_info().decode(),
        }

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
