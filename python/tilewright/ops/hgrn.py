# SPDX-License-Identifier: Apache-2.0
"""HGRN's element-wise recurrence (arXiv 2311.04823). Kernel: csrc/ops/hgrn."""

from __future__ import annotations

from torch import Tensor

from tilewright.ops.sequence import piece


def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if (here := piece()) is not None:
        options = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return here.hgrn(chunk_hgrn, x, g, initial_state=initial_state, **options)
    from tilewright.reference.linear_attention import hgrn_recurrence

    h, state = hgrn_recurrence(x, g, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return h.to(x.dtype), state if output_final_state else None


fused_recurrent_hgrn = chunk_hgrn
