#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in less than nine minutes:
#   benchmarks/gpu_all.sh [FOLDER]      (benchmarks/results unless given)
#   benchmarks/gpu_all.sh --check       (through made-up drivers and on CPUs: writes nothing)
# Each line is a process of its own with a time limit of its own, and writes what it knows
# after each of its parts: neither a failure nor a limit loses what others have found.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [[ ${1:-} == --check ]]; then
  with=(--check)
else
  with=(--out "${1:-benchmarks/results}")
fi
failed=0
run() {
  local limit=$1
  shift
  echo "+ $*"
  timeout "$limit" "$python" "$@" "${with[@]}" >/dev/null || { echo "failed: $?"; failed=1; }
}
run 75 benchmarks/gpu_page_pool.py
run 150 benchmarks/gpu_decoder.py --shape 8b --attention kernels
run 75 benchmarks/gpu_decoder.py --shape 8b --attention gather
run 170 benchmarks/gpu_engine.py
run 65 benchmarks/gpu_decoder.py --shape 13b --attention kernels
exit $failed
