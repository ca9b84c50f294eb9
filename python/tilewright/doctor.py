# SPDX-License-Identifier: Apache-2.0
"""What this installation can use, and why not where it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

OPTIONAL = {
    "transformers": "load transformers checkpoints, tokenizers",
    "accelerate": "let transformers read GGUF files (torch rows of `tw demo`)",
    "safetensors": "save and load checkpoints",
    "gguf": "load GGUF files",
    "typer": "the command tw",
    "rich": "tables and progress bars",
    "matplotlib": "the picture of `tw demo`",
}
ISA_VARIABLE = "TILEWRIGHT_ISA"
OLDEST_TORCH = (2, 10)


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def machine() -> dict[str, Any]:
    """What a measurement must say about where it was made."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": isa().get("active"),
    }


def isa() -> dict[str, Any]:
    """Instruction-set levels: detected, active, and the override; `reason` when they cannot be asked for."""
    override = os.environ.get(ISA_VARIABLE)
    try:
        from tilewright import _host

        return {"detected": _host.isa_detected(), "active": _host.isa_active(), "override": override}
    except (ImportError, RuntimeError, ValueError) as error:
        return {"detected": None, "active": None, "override": override, "reason": str(error)}


def build() -> dict[str, Any]:
    """How the native code was compiled; `reason` when it is absent."""
    try:
        from tilewright import _host

        return dict(_host.build_info())
    except ImportError as error:
        return {"reason": str(error)}


def libraries() -> dict[str, Any]:
    """The native libraries: path, whether loaded, and the reason when not."""
    from tilewright import _native

    rows = {"cpu": _native.cpu_library(), "cuda": _native.cuda_library()}
    return {
        name: {"path": str(row.path) if row.path else None, "loaded": row.loaded, "reason": row.reason}
        for name, row in rows.items()
    }


def torch_report() -> dict[str, Any]:
    """torch, its C++ ABI and CUDA, and whether it is new enough for the stable ABI in use."""
    import torch

    version = torch.__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    supported = numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST_TORCH
    report: dict[str, Any] = {
        "version": version,
        "supported": supported,
        "needed": f">= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}",
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "threads": torch.get_num_threads(),
        "cuda_built": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "devices": [],
    }
    if report["cuda_available"]:
        report["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return report


def optional_packages() -> dict[str, Any]:
    """Version of every optional package, None where absent, with what it is for."""
    rows = {}
    for name, purpose in OPTIONAL.items():
        present = importlib.util.find_spec(name) is not None
        rows[name] = {"version": importlib.metadata.version(name) if present else None, "for": purpose}
    return rows


def peers() -> dict[str, Any]:
    """Other engines that benches compare with: None where usable, else the reason."""
    from tilewright.measure.launch import why_absent

    return {name: why_absent(name) for name in ("llama.cpp", "ik_llama.cpp")}


def data() -> dict[str, Any]:
    """Cache folder and the fetched files in it; a reason where one is absent."""
    from tilewright.data import cache_dir, smollm2_gguf
    from tilewright.data.text import find_encyclopedia

    found: dict[str, Any] = {"cache": str(cache_dir())}
    try:
        found["smollm2"] = {"path": str(smollm2_gguf()), "reason": ""}
    except (OSError, ValueError) as error:
        found["smollm2"] = {"path": None, "reason": str(error)}
    try:
        path = find_encyclopedia()
        reason = "" if path else "absent; `tw fetch encyclopedia`"
    except OSError as error:
        path, reason = None, str(error)
    found["encyclopedia"] = {"path": str(path) if path else None, "reason": reason}
    return found


def report() -> dict[str, Any]:
    """Everything; `problems` lists what keeps tilewright from working, empty when it is healthy."""
    found: dict[str, Any] = {
        "tilewright": importlib.metadata.version("tilewright"),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch_report(),
        "isa": isa(),
        "libraries": libraries(),
        "build": build(),
        "packages": optional_packages(),
        "peers": peers(),
        "data": data(),
    }
    problems = []
    if not found["torch"]["supported"]:
        problems.append(f"torch {found['torch']['version']} is too old; {found['torch']['needed']} is needed")
    if not found["libraries"]["cpu"]["loaded"]:
        problems.append(f"no native operators: {found['libraries']['cpu']['reason']}")
    cuda = found["libraries"]["cuda"]
    if found["torch"]["cuda_available"] and not cuda["loaded"]:
        problems.append(f"a CUDA device is here, but its operators are not in use: {cuda['reason']}")
    if "reason" in found["isa"] and found["isa"]["override"]:
        problems.append(f"{ISA_VARIABLE}={found['isa']['override']}: {found['isa']['reason']}")
    found["problems"] = problems
    return found
