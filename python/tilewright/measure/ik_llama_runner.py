# SPDX-License-Identifier: Apache-2.0
"""ik_llama.cpp through the ctypes bindings of `ik_llama_cpp`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ik_llama_cpp
from ik_llama_cpp import _ctypes_api as api

from .llama_family import LlamaFamily


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Send the library's loading log, which goes to file descriptor 2, nowhere."""
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def requantize(model: str, form: str, folder: str) -> str:
    """Path of `model` rewritten in another of ik_llama.cpp's formats, inside `folder`."""
    target = Path(folder) / f"{Path(model).stem}.{form}.gguf"
    program = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
    command = [str(program), "--allow-requantize", model, str(target), form]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{model}: llama-quantize cannot make {form}: {done.stderr.strip().splitlines()[-1:]}")
    return str(target)


class Runner(LlamaFamily):
    """A GGUF file in ik_llama.cpp, greedy.

    `form` first rewrites the file in that format; `repack` interleaves rows while loading.
    """

    api = api

    def __init__(self, model: str, threads: int, max_length: int, form: str = "", repack: bool = False) -> None:
        self.form = form or ("run-time repack" if repack else "")
        with muted(), tempfile.TemporaryDirectory() as folder:
            api.llama_backend_init()
            load = api.llama_model_default_params()
            load.repack_tensors, load.use_mmap = repack, not repack
            path = requantize(model, form, folder) if form else model
            self.file_bytes = Path(path).stat().st_size
            self.model = api.llama_model_load_from_file(path.encode(), load)
            if not self.model:
                raise ValueError(f"{path}: ik_llama.cpp cannot load this file")
            parameters = api.llama_context_default_params()
            parameters.n_ctx = max_length
            parameters.n_threads = parameters.n_threads_batch = threads
            self.context = api.llama_init_from_model(self.model, parameters)
            if not self.context:
                raise RuntimeError(f"ik_llama.cpp made no context of {max_length} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.position = 0

    def facts(self) -> dict[str, Any]:
        library = ctypes.CDLL(str(Path(ik_llama_cpp.__file__).parent / "lib" / "libllama.so"))
        library.llama_print_system_info.restype = ctypes.c_char_p
        counted = self._ask(library, "llama_model_size", ctypes.c_uint64)
        count = self._ask(library, "llama_model_n_params", ctypes.c_uint64)
        if counted > self.file_bytes:
            # A tied embedding is counted a second time as the output matrix.
            count -= self.vocabulary * self._ask(library, "llama_model_n_embd", ctypes.c_int32)
        return {
            "bytes": self.file_bytes,
            "bits_per_weight": 8 * self.file_bytes / count,
            "library": f"ik_llama_cpp_python {importlib.metadata.version('ik_llama_cpp_python')}",
            "form": self.form,
            "instructions": library.llama_print_system_info().decode(),
        }

    def _ask(self, library: ctypes.CDLL, name: str, result: Any) -> int:
        function = getattr(library, name)
        function.restype, function.argtypes = result, [ctypes.c_void_p]
        return int(function(self.model))

    def clear(self) -> None:
        self.api.llama_kv_cache_clear(self.context)
