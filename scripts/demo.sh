#!/usr/bin/env bash
# The whole analysis of the small model that ships with the package: writes out/demo.json and its companions.
# Flags are passed on, and the last one counts: scripts/demo.sh --top_k=4 --out=elsewhere.json
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh"
mkdir -p "$root/out"
exec "$root/.venv/bin/python" "$root/scripts/delta_svd.py" --model=demo --out="$root/out/demo.json" "$@"
