#!/usr/bin/env bash
# Keeps one long training run going on cores that are idle, and says how far it is.
#
#   benchmarks/idle_run.sh FOLDER [FLAGS OF main.py…]
#   benchmarks/idle_run.sh ~/penn @recipes/penn.txt --data /path/to/penn --precision bf16
#
# The first call clones this repository's HEAD into FOLDER/code and trains from there, so that later
# edits do not change the run. Every call starts the run where it is not running, from its last
# checkpoint, with the flags of the first call, and prints its last validations.
# kill -STOP or -TERM $(cat FOLDER/pid) pauses or ends it. Variable: PYTHON, the interpreter.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 FOLDER [FLAGS OF main.py…]" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(realpath "$1")
shift
if [ ! -e "$folder/code" ]; then
  if [ $# -eq 0 ]; then
    echo "error: $folder: no run is there; give main.py's flags to start one" >&2
    exit 2
  fi
  git clone --quiet "$(dirname "$(realpath "$0")")/.." "$folder/code"
  printf '%s\n' "$@" >"$folder/flags.txt"
fi
mapfile -t flags <"$folder/flags.txt"
if ! { [ -e "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; }; then
  cd "$folder/code"
  # Linux shares the cores between sessions first, if it groups processes by session (autogroup):
  # nice counts within one only, and /proc/PID/autogroup between them.
  lowest='{ echo 19 >/proc/self/autogroup; } 2>/dev/null; exec nice -n 19 "$@"'
  OMP_WAIT_POLICY=PASSIVE setsid nohup bash -c "$lowest" - \
    "${PYTHON:-python3}" main.py "${flags[@]}" --save "$folder/run.pt" \
    --resume auto --checkpoint-minutes 10 >>"$folder/log.txt" 2>&1 &
  echo $! >"$folder/pid"
  echo "| started, process $!"
fi
echo "| commit $(git -C "$folder/code" rev-parse --short HEAD) | ${flags[*]} | $folder/log.txt"
grep '^| end of epoch' "$folder/log.txt" 2>/dev/null | tail -n 3 || echo "| no epoch has ended yet"
