#!/usr/bin/env bash
# Everything that is measured at full 8x7B size on one GPU, within eight minutes there:
#
#   benchmarks/gpu.sh                      JSON under benchmarks/results/gpu/
#   benchmarks/gpu.sh --reduced FOLDER     the small model on whatever this machine has: CI runs it
#
# PYTHON names the interpreter, of an environment with the `parity` and `cuda` extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
model=mixtral-8x7b layers=32 batches=(1 8 32 128) lengths=(128 512 2048) rows=(1 8 64 512 4096)
steps=64 results=benchmarks/results/gpu
if [[ ${1:-} == --reduced ]]; then
  model=small layers=2 batches=(1 3) lengths=(32) rows=(1 8) steps=4
  results=${2:?folder for the results}
elif [[ $# -gt 0 ]]; then
  echo "error: benchmarks/gpu.sh: expected --reduced FOLDER or nothing, got $1" >&2
  exit 64
fi
mkdir -p "$results"

measure() {
  local name=$1 start=$SECONDS
  shift
  "$python" "benchmarks/$name.py" --model "$model" "$@" --json >"$results/$name.json.part"
  mv "$results/$name.json.part" "$results/$name.json"
  echo "$name: $((SECONDS - start)) s" >&2
}

measure decode --layers "$layers" --batches "${batches[@]}" --steps "$steps" --rounds 3
# Packed codes, without the plain weights beside them: 8x7B in 16 bits fills a GPU alone.
for scheme in int8 int4; do
  "$python" benchmarks/decode.py --model "$model" --layers "$layers" --schemes "$scheme" --no-plain \
    --batches "${batches[@]:0:3}" --steps "$steps" --rounds 3 --json >"$results/decode_$scheme.json.part"
  mv "$results/decode_$scheme.json.part" "$results/decode_$scheme.json"
done
measure prefill --layers "$layers" --lengths "${lengths[@]}" --rounds 3
measure moe_layer --mesh 1x1 --rows "${rows[@]}"
measure in_turns --layers "$layers" --batches "${batches[@]:0:2}" --lengths "${lengths[@]:0:1}" \
  --steps "$steps" --rounds 2 --turns 1
echo "$SECONDS s in all; results in $results" >&2
