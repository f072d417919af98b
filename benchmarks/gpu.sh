#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the build, the tests on it, compute-sanitizer, the benchmarks.
#
#     benchmarks/gpu.sh [FOLDER]
#
# FOLDER (gpu-results) gets benchmarks.json, benchmarks.md and a log of each part; a summary is printed last. It needs
# torch, triton, pytest, nvcc and compute-sanitizer, and no network. The exit status counts the parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$(realpath -m "${1:-gpu-results}")
mkdir -p "$out"
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device" >&2; exit 1; }
unset TRITON_INTERPRET

failed=0 summary=()
part() {  # NAME SECONDS COMMAND...: at most so long, into its own log
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    ((status == 0)) || failed=$((failed + 1))
    summary+=("$(printf '%-28s %4d s  %s' "$name" $((SECONDS - start)) "$( ((status == 0)) && echo passed || echo "FAILED: $status")")")
}

{ nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; nvcc --version | tail -1; git rev-parse HEAD; } > "$out/machine.log" 2>&1
architecture=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
FASTGUIDE_CUDA=1 FASTGUIDE_CUDA_ARCHS=$architecture part build 90 python3 setup.py build_ext --inplace
part doctor 30 python3 -c 'from fastguide.cli import main; main(["doctor"])'

# Each test compiles its own kernels, which is work for one core: in turn to a dozen processes.
export out pytest="python3 -m pytest -q -p no:cacheprovider"
part tests 180 bash -c '
    { $pytest --collect-only tests/ops/test_triton.py tests/ops/test_{randn,resample,gather_particles}_cuda.py -k "not emulated" &&
      $pytest --collect-only tests/test_capture.py -k cuda; } | grep :: > "$out/tests.txt" || exit 1
    split -n r/12 "$out/tests.txt" "$out/tests.txt."
    printf "%s\n" "$out"/tests.txt.* | xargs -P 12 -I {} $pytest @{}'
rm -f "$out"/tests.txt.*
part sanitizer 80 bash -c '
    some="not emulated and (known or bits or sizes or aligned or smaller or workspace or slots or dead)"
    printf "%s\n" tests/ops/test_{randn,resample,gather_particles}_cuda.py | xargs -P 3 -n 1 compute-sanitizer --error-exitcode 1 $pytest -k "$some"'
part benchmarks $((530 - SECONDS)) python3 -m benchmarks randn/float32 reverse_step/stochastic reverse_step/bfloat16 propose_and_weigh \
    log_prob_and_gradient resample/systematic-1e8 resample/batched gather samplers/graph --device cuda --seconds 3 --json "$out/benchmarks.json" --markdown "$out/benchmarks.md"

tail -n 60 "$out/benchmarks.log" | cut -c1-150
grep -E "^FAILED|^ERROR| passed| failed" "$out/tests.log" | cut -c1-150 | tail -n 30
cat "$out/machine.log"
printf '%s\n' "${summary[@]}"
exit "$failed"
