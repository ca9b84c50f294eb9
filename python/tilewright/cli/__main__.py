# SPDX-License-Identifier: Apache-2.0
"""`python -m tilewright.cli`, the same as `tw`."""

from __future__ import annotations

from tilewright.cli import main

main()
