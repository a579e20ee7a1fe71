#!/usr/bin/env bash
# Make or reuse the project's virtual environment: `source tools/environment.sh [test]`, from the repository root.
# VISTALLM_VENV chooses its folder (default .venv). A second call with the same pins takes a second.
set -euo pipefail

venv="${VISTALLM_VENV:-.venv}"
extra="${1:-}"
python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || python=python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "environment.sh: expected Python 3.11 or newer, got $("$python" --version); set PYTHON=/path/to/python3.11" >&2
    exit 1
fi

stamp="$venv/.installed-${extra:-run}"
wanted="$(cksum pyproject.toml | cut -d' ' -f1) $PWD"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "installing the pinned packages into $venv (several GB, two to three minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
# OpenMP threads that spin at barriers steal the core from the loader's worker; asleep they do not.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
