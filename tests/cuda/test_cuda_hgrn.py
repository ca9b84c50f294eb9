# SPDX-License-Identifier: Apache-2.0
"""HGRN's recurrence on the device: values, states and gradients against the step-by-step recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tilewright.ops import chunk_hgrn
from tilewright.reference.linear_attention import hgrn_recurrence

if TYPE_CHECKING:
    from conftest import Device


def results(function: Callable[..., Any], leaves: list[Tensor], offsets: Tensor | None, **options: Any) -> list[Tensor]:
    """h, the final state and the gradients of a weighted sum of both, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    x, g, initial = leaves
    h, state = function(x, g, initial_state=initial, cu_seqlens=offsets, **options)
    weights = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view(h.shape).to(h)
    # Rows behind the last packed sequence are zero and have no gradient.
    gradients = torch.autograd.grad([h, state], leaves, [weights, torch.ones_like(state)], allow_unused=True)
    return [h.detach().cpu(), state.detach().cpu(), *(d.cpu() for d in gradients if d is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_the_recurrence(device: Device, packed: bool, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    for tokens, width in [(1, 5), (19, 130)] if device.is_emulator else [(1, 5), (19, 130), (1000, 512)]:
        batch = 1 if packed else 2
        offsets = torch.tensor([0, tokens // 2, tokens // 2, tokens]) if packed else None
        sequences = 3 if packed else batch
        leaves = [
            torch.randn(batch, tokens, width, generator=rng, dtype=dtype),
            -torch.rand(batch, tokens, width, generator=rng, dtype=dtype),
            torch.randn(sequences, width, generator=rng, dtype=dtype),
        ]
        wanted = results(hgrn_recurrence, [x.double() for x in leaves], offsets)
        plain = results(hgrn_recurrence, leaves, offsets)
        on_device = None if offsets is None else device.tensor(offsets)
        got = results(chunk_hgrn, [device.tensor(x) for x in leaves], on_device, output_final_state=True)
        for a, b, exact in zip(got, plain, wanted, strict=True):
            # Twice torch's own error, and no less than the rounding of the largest result.
            least = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
            bound = max(2 * float((b.double() - exact).abs().max()), least)
            assert float((a.double() - exact).abs().max()) <= bound


def test_rows_behind_the_last_sequence_are_zero(device: Device) -> None:
    x = torch.full((1, 6, 3), torch.nan)
    x[:, :4] = 1.0
    offsets = torch.tensor([0, 4])
    h, _ = chunk_hgrn(device.tensor(x), device.tensor(torch.zeros_like(x)), cu_seqlens=device.tensor(offsets))
    assert torch.equal(h.cpu()[0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]))


def test_errors_name_the_argument(device: Device) -> None:
    x = device.tensor(torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError, match=r"g has shape .* must be that of x = 4"):
        chunk_hgrn(x, device.tensor(torch.zeros(2, 3, 5)))
    with pytest.raises(RuntimeError, match="x has B = 2 with cu_seqlens, needed B = 1"):
        chunk_hgrn(x, x, cu_seqlens=device.tensor(torch.tensor([0, 3])))
