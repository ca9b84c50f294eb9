#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# An environment that sees the packages of .venv but not its editable install of tilewright.
#   scripts/overlay_venv.sh DIRECTORY
# A path file inside a folder that was itself added by a path file is not read, so the editable finder stays out.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x "$1/bin/python" ]] || .venv/bin/python -m venv --without-pip "$1"
base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
target=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$base" > "$target/base.pth"
echo "$target"
