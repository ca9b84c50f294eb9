# SPDX-License-Identifier: Apache-2.0
"""Ternary products of llama.cpp and ik_llama.cpp through the ggml library that their Python packages bring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.timing import Elapsed
from tilewright.measure.launch import installed, peer_environments

WORKER = Path(__file__).with_name("ggml_worker.py")


@dataclass(frozen=True)
class Form:
    """A ggml type: its number, the columns and rows that it needs a multiple of."""

    package: str
    number: int
    columns: int
    rows: int = 1


FORMS = {
    "llama.cpp TQ2_0": Form("llama_cpp", 35, 256),
    "llama.cpp TQ1_0": Form("llama_cpp", 34, 256),
    "ik_llama.cpp IQ2_BN": Form("ik_llama_cpp", 135, 64),
    "ik_llama.cpp IQ2_BN_R4": Form("ik_llama_cpp", 335, 64, 4),
    "ik_llama.cpp IQ1_BN": Form("ik_llama_cpp", 134, 64),
}


class Process:
    """A worker with one product; calling it gives nanoseconds, measured by the worker."""

    def __init__(self, python: Path, form: Form, folder: Path, copies: int, threads: int) -> None:
        request = {"folder": str(folder), "type": form.number, "copies": copies, "threads": threads}
        command = [str(python), str(WORKER), form.package, json.dumps(request)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        words = self._line().split()
        if words[:1] != ["ready"]:
            raise RuntimeError(f"{form.package} ended with code {self.process.wait()}")
        self.weight_bytes = int(words[1])
        self.result = torch.from_numpy(np.load(folder / "y.npy"))

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self, _: int) -> Elapsed:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Elapsed(self._line())

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def products(x: torch.Tensor, weight: torch.Tensor, copies: int, threads: int) -> dict[str, Process]:
    """Workers of every form that is installed and takes the shape: x float32 [M, K], weight int8 [N, K]."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", x.numpy())
        np.save(folder / "w.npy", weight.float().numpy())
        for title, form in FORMS.items():
            if weight.shape[1] % form.columns or weight.shape[0] % form.rows:
                continue
            for python in peer_environments():
                if python != Path(sys.executable) and form.package in installed(python, (form.package,)):
                    build = " (native build)" if "native" in str(python) else ""
                    try:
                        found[title + build] = Process(python, form, folder, copies, threads)
                    except RuntimeError as error:
                        print(f"bench: {title}{build} is left out: {error}", file=sys.stderr)
    return found
