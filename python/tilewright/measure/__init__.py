# SPDX-License-Identifier: Apache-2.0
"""How a language model runs: perplexity, speed and resident memory, each method in a process of its own.

`protocol` and the runners of other projects' engines import neither torch nor tilewright, so that they also run in
an environment that holds only such an engine. A runner is one class per way of running a model; `worker` is the
program that measures one; `launch` starts it and reads what it found.
"""

from __future__ import annotations
