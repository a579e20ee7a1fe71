#!/usr/bin/env bash
# Environment with test tools, lint, types, the whole suite: `bash tools/test.sh [pytest arguments]`.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh test
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist loadfile "$@"
