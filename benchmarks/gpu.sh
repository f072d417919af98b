#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the build, the tests on it, compute-sanitizer, the benchmarks.
#
#     benchmarks/gpu.sh [FOLDER]
#
# FOLDER (gpu-results) gets benchmarks.json, benchmarks.md and a log of each part; a summary is printed last. It needs
# torch, triton, pytest, nvcc and compute-sanitizer, and no network. The exit status counts the parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-results}")
mkdir -p "$out"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device" >&2; exit 1; }
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
architecture=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
FASTGUIDE_CUDA=1 FASTGUIDE_CUDA_ARCHS=$architecture part build 90 python setup.py build_ext --inplace
part doctor 30 python -c 'from fastguide.cli import main; main(["doctor"])'

# Each test compiles its own kernels, which is work for one core: side by side.
tests() { python -m pytest -q -p no:cacheprovider "$@"; }
export -f tests
part tests 180 bash -c '
    tests tests/test_kernels.py -k randn & a=$!
    tests tests/test_kernels.py -k "reverse_step or dtypes or finite" & b=$!
    tests tests/test_kernels.py -k "propose or noise or chunks" & c=$!
    tests tests/test_kernels.py -k "density or log_prob or student or measurements or empty or tiles or backend" & d=$!
    tests tests/test_*_cuda.py -k "not emulated" & e=$!
    tests tests/test_graphs.py -k cuda & f=$!
    status=0
    for job in $a $b $c $d $e $f; do wait $job || status=1; done
    exit $status'
part sanitizer 60 compute-sanitizer --error-exitcode 1 python -m pytest -q -p no:cacheprovider tests/test_*_cuda.py \
    -k "not emulated and (known or bits or sizes or aligned or smaller or workspace or slots or dead)"
part benchmarks 170 python -m benchmarks randn/float32 reverse_step/stochastic reverse_step/bfloat16 propose_and_weigh \
    log_prob_and_gradient resample/systematic-1e8 resample/batched gather samplers/graph --device cuda --seconds 3 --json "$out/benchmarks.json" --markdown "$out/benchmarks.md"

tail -n 60 "$out/benchmarks.log" | cut -c1-150
tail -n 3 "$out/tests.log"
cat "$out/machine.log"
printf '%s\n' "${summary[@]}"
exit "$failed"
