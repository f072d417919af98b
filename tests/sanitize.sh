#!/usr/bin/env bash
# The kernels' tests on builds with sanitizers: `tests/sanitize.sh address` (with undefined behaviour), `emulated` (the
# same for the emulated CUDA kernels) or `thread`.
# In a copy of the tree, which needs the packages of the test extra and nothing installed of fastguide itself.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?expected address, emulated or thread}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -c --exclude=__pycache__ csrc fastguide tests setup.py pyproject.toml README.md LICENSE | tar -x -C "$work"
cd "$work"
rm -f fastguide/*.so
sed -i 's/ -O3 / -O1 /' csrc/rules.ninja  # what is looked for is in the source, and -O3 takes minutes to compile

export FASTGUIDE_CUDA=0 OMP_NUM_THREADS=2
case $kind in
address | emulated)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=all"
    libraries="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
    # Python frees nothing at its end, and torch is no business of ours.
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:log_path=$work/report
    export UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report
    # The CUDA kernels are emulated by coroutines, whose frames the sanitizer must leave on their stacks.
    emulated="-fsanitize=address --param asan-use-after-return=0 -g1"
    selected=(tests/*/test_*_kernel.py)
    [ "$kind" = address ] || selected=(tests/ops/test_*_cuda.py)  # ten minutes: by hand, after a change of CUDA kernels
    ;;
thread)
    # Threads of the standard library, as the sanitizer sees no order in what OpenMP's wait for. Not the tests of races,
    # which are just what it reports.
    flags="-fsanitize=thread -DFG_THREAD_SANITIZER"
    libraries=$(g++ -print-file-name=libtsan.so)
    export TSAN_OPTIONS=halt_on_error=1:log_path=$work/report
    emulated=
    selected=(tests/*/test_*_kernel.py -k thread)
    ;;
*) echo "expected address, emulated or thread, got $kind" >&2; exit 2 ;;
esac
CXXFLAGS="$flags -g1 -fno-omit-frame-pointer" LDFLAGS="$flags" python setup.py -q build_ext --inplace >build.log 2>&1 || { tail -40 build.log; exit 1; }
# Addresses that are not random: the thread sanitizer wants its own.
status=0
CXX="${CXX:-g++} $emulated" LD_PRELOAD=$libraries setarch -R python -m pytest -q -p no:cacheprovider "${selected[@]}" ||
    status=$?
((status == 0)) || cat report.* 2>/dev/null || true
exit $status
