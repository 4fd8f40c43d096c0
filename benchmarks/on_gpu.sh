#!/usr/bin/env bash
# Runs everything that needs a GPU, for at most ten minutes a call; the next call continues.
#
#   benchmarks/on_gpu.sh FOLDER [PTB_FOLDER]
#
# FOLDER gets the results, small files: report.md (a table, then all Markdown), gpu-tests.log,
# training-penn.json, training-wikitext-2.json, the recipe's metrics.jsonl and summary.json, and
# logs.txt (the ends of the other logs). PTB_FOLDER has PTB's train.txt, valid.txt and test.txt
# (data/penn, if not given); without them the recipe is left out.
# Needs torch and pytest, no network. Variables: PYTHON, the interpreter (python3); BUDGET, the
# seconds of a call (560); STATE, the folder of what a later call needs, with checkpoints of some
# 300 MB (FOLDER/state; put it elsewhere if FOLDER is emptied or downloaded between calls).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "error: usage: benchmarks/on_gpu.sh FOLDER [PTB_FOLDER]" >&2
  exit 2
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no GPU on this machine; everything here wants one" >&2
  exit 2
fi
state=${STATE:-$1/state}
mkdir -p "$1" "$state"
out=$(cd "$1" && pwd)
state=$(cd "$state" && pwd)
if [ $# -eq 2 ]; then penn=$(cd "$2" && pwd); else penn=data/penn; fi
cd "$(dirname "$0")/.."
deadline=$((SECONDS + ${BUDGET:-560}))
# Without it cuDNN's recurrent layers need not give the same twice.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}

# The results so far, in lines of Markdown.
table() {
  local name
  for name in gpu-tests penn; do
    if [ -e "$state/$name.log" ]; then echo "| $name | $(tail -n 1 "$state/$name.log") |"; fi
  done
  if [ -e "$state/PTB/metrics.jsonl" ]; then
    { grep '"valid"' "$state/PTB/metrics.jsonl" || true; } | tail -n 1
  fi
  for name in training-penn training-wikitext-2; do
    if [ -e "$state/$name.md" ]; then echo && { grep '^|' "$state/$name.md" || true; }; fi
  done
}

# Copy the results into FOLDER; after each step, in case this script is killed.
gather() {
  local name
  {
    table
    for name in training-penn training-wikitext-2; do
      if [ -e "$state/$name.md" ]; then echo && echo "# $name" && echo && cat "$state/$name.md"; fi
    done
  } >"$out/report.md"
  for name in gpu-tests.log training-penn.json training-wikitext-2.json PTB/metrics.jsonl \
    PTB/summary.json; do
    if [ -e "$state/$name" ]; then cp "$state/$name" "$out"; fi
  done
  for name in training-penn training-wikitext-2 penn; do
    if [ -e "$state/$name.log" ]; then echo "# $name" && tail -n 200 "$state/$name.log"; fi
  done >"$out/logs.txt"
}

# step NAME SECONDS COMMAND…: run it for at most so long, unless an earlier call did.
step() {
  local name=$1 most=$2 left=$((deadline - SECONDS))
  shift 2
  if [ -e "$state/$name.done" ] || [ "$left" -lt 30 ]; then return 0; fi
  local code=0
  timeout $((left < most ? left : most)) "$@" >"$state/$name.log" 2>&1 || code=$?
  # Failed tests would fail again; what was cut short or ran out of time may not.
  if [ $code -eq 0 ] || { [ $code -eq 1 ] && tail -n 1 "$state/$name.log" | grep -q ' failed'; }; then
    touch "$state/$name.done"
  fi
  if [ $code -ne 0 ]; then
    echo "| $name | failed or out of time: $(tail -n 1 "$state/$name.log") |"
  fi
  gather
}

step gpu-tests 300 "$python" -m pytest -m gpu
step training-penn 280 "$python" -m benchmarks.training --recipe penn --updates 200 \
  --output "$state/training-penn.md"
step training-wikitext-2 280 "$python" -m benchmarks.training --recipe wikitext-2 --updates 100 \
  --output "$state/training-wikitext-2.md"

# The recipe, resumed exactly by each call; SIGTERM makes it write a checkpoint.
left=$((deadline - SECONDS - 20))
if [ -e "$penn/train.txt" ] && [ "$left" -ge 30 ] && [ ! -e "$state/penn.done" ]; then
  if timeout --signal TERM --kill-after 20 "$left" "$python" main.py @recipes/penn.txt \
    --data "$penn" --save "$state/PTB.pt" --resume auto --precision bf16 \
    --checkpoint-minutes 2 >>"$state/penn.log" 2>&1; then
    touch "$state/penn.done"
  fi
fi

gather
table
