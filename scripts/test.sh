#!/usr/bin/env bash
# The tests, on the CPU and without a network. Arguments go to pytest, with paths from the root of the
# repository: scripts/test.sh tests/test_model.py -k parity
set -euo pipefail

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
export HF_HUB_OFFLINE=1
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}
# All tests on two workers, those of a file on one; a single file starts faster without them.
if [ $# = 0 ]; then
  set -- -n 2 --dist=loadfile
fi
exec .venv/bin/python -m pytest "$@"
