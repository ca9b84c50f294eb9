# SPDX-License-Identifier: Apache-2.0
"""transformers on plain eager torch, weights dequantized to one float type: the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from tilewright.models.hf_names import cache_name


class Runner:
    """A transformers model in `dtype` ("float32" or "bfloat16"), loaded by transformers itself."""

    def __init__(self, model: str, threads: int, max_length: int, dtype: str = "float32") -> None:
        del max_length
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.utils.logging.disable_progress_bar()
        path = Path(model)
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
        if path.is_file():
            place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.model = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype)).eval()
        self.dtype = dtype
        self.reset()

    def facts(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in parameters)
        return {
            "bytes": size,
            "bits_per_weight": 8 * size / count,
            "library": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }

    def reset(self) -> None:
        self.cache = DynamicCache()

    def prefill(self, tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        out = self.model(input_ids=ids, **{cache_name(): self.cache}, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
