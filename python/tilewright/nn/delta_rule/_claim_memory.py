# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one piece of work, measured in a process of its own (and the works that the claims measure)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.measure.protocol import memory_bytes

Work = Callable[[], Any]


def backward_of_delta_rule(method: str, tokens: int, heads: int, size: int) -> Work:
    """Forward and backward of the delta rule [1, tokens, heads, size]: "chunk", or "autograd" of the recurrence."""
    from tilewright.nn.delta_rule._claim_exact import draw, recurrence
    from tilewright.ops import chunk_delta_rule

    def leaves(tokens: int) -> dict[str, Any]:
        inputs = draw("delta", 1, tokens, heads, heads, size, size, dtype=torch.float32)
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def work(inputs: dict[str, Any]) -> Tensor:
        out, _ = chunk_delta_rule(**inputs) if method == "chunk" else recurrence(**inputs)
        out.sum().backward()
        return out

    work(leaves(65))  # libraries, thread pools and small arenas are there before the measurement
    inputs = leaves(tokens)
    return lambda: work(inputs)


def forward_of_lightning(tokens: int, heads: int, size: int) -> Work:
    """Forward of lightning attention [1, tokens, heads, size] into an output whose pages are new."""
    from tilewright.ops import build_slope_tensor, lightning_attn_func

    q, k, v = (torch.randn(1, tokens, heads, size) for _ in range(3))
    slopes = build_slope_tensor(heads)
    with torch.no_grad():
        lightning_attn_func(q[:, :65], k[:, :65], v[:, :65], slopes)

    def work() -> Tensor:
        with torch.no_grad():
            return lightning_attn_func(q, k, v, slopes)[0]

    return work


WORKS: dict[str, Callable[..., Work]] = {
    "backward_of_delta_rule": backward_of_delta_rule,
    "forward_of_lightning": forward_of_lightning,
}


def peak_growth(work: str, **options: Any) -> int:
    """Growth in bytes of resident memory while `WORKS[work](**options)` runs, alone in a fresh process, one thread.

    It is the highest resident size during the work over the size before it (Linux).

    Raises:
        RuntimeError: the process failed; the message holds its last words.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # Blocks of a megabyte are mapped one by one, so that the heap's holes do not count.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    command = [sys.executable, "-m", __name__, json.dumps({"work": work, "options": options})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"measuring memory of {work} {options} failed: {' '.join(last) or 'no message'}")
    return int(done.stdout)


def main() -> None:
    """In the fresh process: the growth in bytes on standard output."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    work = WORKS[request["work"]](**request["options"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")
    kept = work()
    print(memory_bytes("VmHWM") - before)
    del kept


if __name__ == "__main__":
    main()
