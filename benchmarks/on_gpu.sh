#!/usr/bin/env bash
# Everything that wants a GPU, in one call of at most ten minutes; the same call again goes on.
#
#   benchmarks/on_gpu.sh FOLDER [PTB_FOLDER]
#
# FOLDER gets the results as files. PTB_FOLDER has PTB's train.txt, valid.txt and test.txt (data/penn,
# if not given); without them the recipe is left out. Needs torch and pytest, no network. Variables:
# PYTHON, the interpreter (python3); BUDGET, the seconds of a call (560).
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
mkdir -p "$1"
out=$(cd "$1" && pwd)
if [ $# -eq 2 ]; then penn=$(cd "$2" && pwd); else penn=data/penn; fi
cd "$(dirname "$0")/.."
deadline=$((SECONDS + ${BUDGET:-560}))

# step NAME SECONDS COMMAND…: run it unless an earlier call did, for so long at most.
step() {
  local name=$1 most=$2 left=$((deadline - SECONDS))
  shift 2
  if [ -e "$out/$name.done" ] || [ "$left" -lt 30 ]; then return 0; fi
  if timeout $((left < most ? left : most)) "$@" >"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
  else
    echo "| $name: failed or out of time, see $out/$name.log"
  fi
}

step gpu-tests 300 "$python" -m pytest -m gpu
step training-penn 120 "$python" -m benchmarks.training --recipe penn --updates 200 \
  --output "$out/training-penn.md"
step training-wikitext-2 120 "$python" -m benchmarks.training --recipe wikitext-2 --updates 100 \
  --output "$out/training-wikitext-2.md"

# The recipe, exactly resumed by each call; SIGTERM makes it write a checkpoint.
left=$((deadline - SECONDS - 20))
if [ -e "$penn/train.txt" ] && [ "$left" -ge 30 ] && [ ! -e "$out/penn.done" ]; then
  if timeout --signal TERM --kill-after 20 "$left" "$python" main.py @recipes/penn.txt \
    --data "$penn" --save "$out/PTB.pt" --resume auto --precision bf16 \
    --checkpoint-minutes 2 >>"$out/penn.log" 2>&1; then
    touch "$out/penn.done"
  fi
fi

for file in "$out"/gpu-tests.log "$out"/penn.log; do
  if [ -e "$file" ]; then echo "| $(basename "$file"): $(tail -n 1 "$file")"; fi
done
if [ -e "$out/PTB/metrics.jsonl" ]; then grep '"valid"' "$out/PTB/metrics.jsonl" | tail -n 1; fi
for file in "$out"/training-*.md; do
  if [ -e "$file" ]; then grep '^|' "$file"; fi
done
