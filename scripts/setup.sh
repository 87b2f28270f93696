#!/usr/bin/env bash
# Makes .venv at the root of the repository, or brings it up to date; when it is current, looks and leaves.
#
#   scripts/setup.sh            what a run needs, with CUDA where there is an NVIDIA driver
#   scripts/setup.sh test       and what the tests need
#   scripts/setup.sh EXTRA...   and other extras of pyproject.toml: cuda12, cuda13, tpu, torch, gguf, train, figures,
#                               frames, steering, corpora, docs
#
# PYTHON=/path/to/python3 chooses the Python. VENV=NAME makes another environment than .venv, at the root, too.
# What was once asked for stays: a run does not undo `test`.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
name=${VENV:-.venv}
venv=$root/$name
python=$venv/bin/python
log=$venv/setup.log
stamp=$venv/.stamp          # a checksum of what the environment was made from, then its extras
unfinished=$venv.unfinished # is there while pip writes: an environment found with it is half of one

say() { printf 'setup.sh: %s\n' "$*" >&2; }
die() {
  say "$@"
  exit 1
}

# The CUDA extra that every GPU here can run, from driver and GPU; nothing where there is none.
# CUDA 13 needs driver 580 and compute capability 7.5 (Turing), CUDA 12 needs driver 525.
cuda_extra() {
  { nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null || true; } |
    awk -F', *' '
      $1 !~ /^[0-9]+\./ { next }
      { gpus++; if ($1 + 0 < 580 || $2 + 0 < 7.5) older = 1; if ($1 + 0 < 525) too_old = $1 }
      END {
        if (too_old) print "setup.sh: NVIDIA driver " too_old " is older than 525: going without CUDA" > "/dev/stderr"
        else if (gpus) print older ? "cuda12" : "cuda13"
      }'
}

# The extras asked for, now and before, as pip writes them: "cuda13,test".
wanted_extras() {
  local wanted
  wanted=$(
    if [ -f "$stamp" ]; then sed -n 2p "$stamp" | tr , '\n'; fi
    printf '%s\n' "$@"
  )
  grep -qE '^(cuda|tpu)' <<<"$wanted" || wanted+=$'\n'$(cuda_extra)
  wanted=$(sort -u <<<"$wanted" | sed '/^$/d')
  [ "$(grep -cE '^(cuda|tpu)' <<<"$wanted")" -le 1 ] ||
    die "one of cuda12, cuda13 and tpu at a time; remove $name to change from one to another"
  paste -sd, - <<<"$wanted"
}

# Whatever the environment depends on. The root is part of it: the editable install points there.
fingerprint() {
  {
    printf '%s\n' "$root" "$extras"
    "$python" -V
    cat "$root/pyproject.toml" "$root/requirements/constraints.txt"
  } 2>&1 | cksum
}

current() {
  [ -f "$stamp" ] && [ ! -e "$unfinished" ] && chosen_python && [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ]
}

# The environment has the Python that was asked for, if one was.
chosen_python() { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -V 2>&1)" = "$("$python" -V 2>&1)" ]; }

# By running it: a pyenv shim can be there for a Python that is not.
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# The Python to make the environment from: python3 where it will do, else the newest that does.
find_python() {
  local candidate without=''
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" || die "PYTHON=$PYTHON does not run, or is older than Python 3.11"
    set -- "$PYTHON"
  else
    set -- python3 python3.13 python3.12 python3.11
  fi
  for candidate in "$@"; do
    runs "$candidate" || continue
    if has_venv "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    without=${without:-$candidate}
  done
  [ -z "$without" ] || die "$without has no venv module; on Debian and Ubuntu: apt-get install" \
    "$("$without" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  die "no Python 3.11 or newer among: $*; install one, or name it: PYTHON=/path/to/python3 scripts/setup.sh"
}

usable() { [ ! -e "$unfinished" ] && runs "$python" && chosen_python && "$python" -m pip --version >/dev/null 2>&1; }

# Only one at a time; who comes second finds the work done. Without flock (macOS), don't start two.
lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$venv.lock"
  flock -n 9 && return
  say "waiting for another set-up of $name to finish"
  flock 9
}

# Why pip failed, in a line.
reason() {
  if grep -qE 'connection broken|Could not fetch URL|Connection(Error| refused| reset)|timed out' "$log"; then
    echo "no network, or the package index does not answer"
  else
    grep -oE 'ERROR: .*' "$log" | tail -n 1 | grep . || tail -n 1 "$log"
  fi
}

install() {
  : >"$unfinished"
  if (cd "$root" && "$python" -m pip install --progress-bar=off --disable-pip-version-check \
    --constraint requirements/constraints.txt --editable ".${extras:+[$extras]}") >"$log" 2>&1; then
    # What pip installs it compiles, all but this package, which lies here.
    "$python" -m compileall -q "$root/jaxdelta" >>"$log" 2>&1 || true
    printf '%s\n' "$(fingerprint)" "$extras" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm "$unfinished"
    return
  fi
  # Up to here pip only looks and downloads: what was there still works.
  grep -q '^Installing collected packages' "$log" || rm "$unfinished"
  die "pip could not install the packages: $(reason) (all it said: $name/setup.log)"
}

for extra in "$@"; do
  case $extra in
    cuda12 | cuda13 | tpu | torch | gguf | train | figures | frames | steering | corpora | docs | test) ;;
    *) die "no extra is called '$extra'; there are cuda12, cuda13, tpu, torch, gguf, train, figures, frames," \
      "steering, corpora, docs and test" ;;
  esac
done
extras=$(wanted_extras "$@")
if current; then exit; fi

lock
extras=$(wanted_extras "$@") # the one before us may have added some
if current; then exit; fi

trap 'exit 130' INT TERM # leaves $unfinished: the next set-up starts afresh
if usable; then
  say "bringing $name up to date${extras:+ [$extras]}..."
else
  base=$(find_python)
  case $extras in
    *cuda*) takes='several minutes the first time: CUDA is a download of 3 GB' ;;
    *) takes='about 2 minutes the first time' ;;
  esac
  say "setting up $name with $("$base" -V 2>&1)${extras:+ [$extras]} ($takes)..."
  : >"$unfinished"
  "$base" -m venv --clear "$venv" || die "$base could not make $venv"
fi
install
