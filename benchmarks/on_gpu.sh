#!/usr/bin/env bash
# What needs a GPU: its tests, the benchmarks, and the PTB recipe for as long as there is time.
#
#   benchmarks/on_gpu.sh FOLDER [PTB_FOLDER]
#
# FOLDER gets a log for each step, the tables of the benchmarks, and the run (PTB.pt and PTB/).
# PTB_FOLDER has PTB's train.txt, valid.txt and test.txt (data/penn, if not given). A call takes
# ten minutes at most; the next one continues: steps with a log are done, the recipe resumes.
# Variables: PYTHON, the interpreter (python3); BUDGET, the seconds of a call (560).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "error: usage: benchmarks/on_gpu.sh FOLDER [PTB_FOLDER]" >&2
  exit 2
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no GPU on this machine" >&2
  exit 2
fi
mkdir -p "$1"
out=$(realpath "$1")
penn=data/penn
if [ $# -eq 2 ]; then penn=$(realpath "$2"); fi
cd "$(dirname "$0")/.."
deadline=$((SECONDS + ${BUDGET:-560}))
# step NAME SECONDS COMMAND…: run a command once; the next call repeats it if it ran out of time.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) code=0
  if [ -e "$out/$name.log" ] || [ "$left" -lt 30 ]; then return 0; fi
  timeout $((left < limit ? left : limit)) "${@:3}" >"$out/$name.part" 2>&1 || code=$?
  echo "$name: exit code $code: $(tail -n 1 "$out/$name.part")"
  if [ $code -ne 124 ]; then mv "$out/$name.part" "$out/$name.log"; fi
}

step machine 30 nvidia-smi
# In one process, without pytest's plugins, of which this machine may have none. A test file that
# cannot be imported here, for want of a package, keeps no other from running. Warnings of this
# machine's torch are shown, and are no failures.
step gpu-tests 300 "$python" -m pytest -o addopts= -q -m gpu -W default \
  --continue-on-collection-errors --durations 5
step training-penn 280 "$python" -m benchmarks.training --recipe penn --updates 200 \
  --output "$out/training-penn.md"
step training-wikitext-2 280 "$python" -m benchmarks.training --recipe wikitext-2 --updates 100 \
  --output "$out/training-wikitext-2.md"

left=$((deadline - SECONDS - 20))
if [ "$left" -ge 30 ]; then # SIGTERM makes it write a checkpoint
  timeout --kill-after 20 "$left" "$python" main.py @recipes/penn.txt --data "$penn" \
    --save "$out/PTB.pt" --resume auto --precision bf16 --checkpoint-minutes 2 \
    2>>"$out/penn.log" || tail -n 1 "$out/penn.log"
fi
