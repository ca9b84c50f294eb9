# SPDX-License-Identifier: Apache-2.0
"""Where the GPU's kernels run in a test: in the emulator, on every machine, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tilewright.testing import Emulator, emulated, emulator_missing


@dataclass(frozen=True)
class Device:
    """A place for a test's tensors, and the orders of threads that are worth trying there."""

    name: str
    emulator: Emulator | None = None

    @property
    def is_emulator(self) -> bool:
        return self.emulator is not None

    @property
    def torch_device(self) -> str:
        return "cpu" if self.is_emulator else "cuda"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the emulator's scheduling; a GPU orders its threads as it likes."""
        return (0, 1, 2) if self.is_emulator else (0,)

    def seed(self, seed: int) -> None:
        """Run what follows with another order of threads."""
        if self.emulator is not None:
            self.emulator.seed(seed)

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device, with its strides where that can be, and its requires_grad."""
        if self.is_emulator:
            return x
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            return x.detach().cuda().requires_grad_(x.requires_grad)  # expanded: elements share memory
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
        return moved.detach().requires_grad_(x.requires_grad)

    def synchronize(self) -> None:
        if not self.is_emulator:
            torch.cuda.synchronize()


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The emulator, then the GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch.cuda.is_available() is False")
        yield Device("cuda")
        return
    if emulator_missing():
        pytest.skip(f"there is no emulator: {emulator_missing()}")
    with emulated() as emulator:
        yield Device("emulator", emulator)
