#!/usr/bin/env bash
# A short check under a newer Python with the newest JAX: the demo runs without a warning, its statistics are
# those of .venv, and a run that was killed resumes. Without a Python 3.12 or newer it says so and does nothing.
#
# PYTHON=/path/to/python3.13 chooses the Python. Makes .venv-smoke (under two minutes, the first time).
set -euo pipefail

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
venv=.venv-smoke
scratch=$(mktemp -d)
running=''
trap '[ -z "$running" ] || kill -9 "$running" 2>/dev/null || true; rm -rf "$scratch"' EXIT

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

say() { printf 'smoke.sh: %s\n' "$*"; }
die() {
  say "$@" >&2
  exit 1
}

# The newest Python that runs, from the PATH or from pyenv.
newer_python() {
  local version candidate
  for version in 3.13 3.12; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
      if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        printf '%s\n' "$candidate"
        return
      fi
    done
  done
}

demo=($venv/bin/python -W error scripts/delta_svd.py --model=demo --noreport)

# Starts a run in the background and kills it when it has kept its first layer. Without the cache of compiled
# programs it is slow enough to be caught.
start_and_kill() {
  JAX_ENABLE_COMPILATION_CACHE=false "${demo[@]}" --quiet "$@" &
  running=$!
  until compgen -G "$scratch/kept/jaxdelta-run/step-??????.json" >/dev/null; do
    kill -0 "$running" 2>/dev/null || die "the run ended before it kept a layer"
    sleep 0.02
  done
  kill -9 "$running"
  wait "$running" 2>/dev/null && die "the run ended before it was killed"
  running=''
}

python=${PYTHON:-$(newer_python)}
if [ -z "$python" ]; then
  say "no Python 3.12 or newer on this machine: skipped"
  exit
fi
VENV=$venv PYTHON=$python scripts/setup.sh
say "$($venv/bin/python -c 'import platform, jax; print(f"Python {platform.python_version()}, JAX {jax.__version__}")')"

scripts/demo.sh --out="$scratch/expected.json" --noreport --quiet
"${demo[@]}" --quiet --out="$scratch/found.json"
$venv/bin/python tests/same_statistics.py "$scratch/expected.json" "$scratch/found.json"

resumable=(--out="$scratch/resumed.json" --checkpoint_dir="$scratch/kept")
start_and_kill "${resumable[@]}"
[ ! -e "$scratch/resumed.json" ] || die "a run that was killed wrote its results"
"${demo[@]}" "${resumable[@]}" >"$scratch/log"
grep 'resumed after layer' "$scratch/log" || die "the run did not resume after its kill"
$venv/bin/python tests/same_statistics.py --tolerance=0 "$scratch/found.json" "$scratch/resumed.json"
say "passed"
