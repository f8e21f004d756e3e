#!/usr/bin/env bash
# The suite under sanitizers, from the root of a clone, in an environment with what `pip install '.[test]'` brings and
# cython, cython-cmake, scikit-build-core, cmake, ninja:
#
#   tools/sanitize.sh address [ARGUMENTS OF PYTEST]     AddressSanitizer and UndefinedBehaviorSanitizer, bounds and overflow checked
#   tools/sanitize.sh thread                            ThreadSanitizer, clang, libomp and Archer, which tells it what OpenMP does
#
# Debian: apt-get install gcc; for `thread` clang-19 libclang-rt-19-dev libomp-19-dev llvm-19.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?address or thread}
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OPENBLAS_NUM_THREADS=1

build() {       # build NAME OPTIONS OF PIP…
    local name=$1
    shift
    python -m pip install --quiet --no-deps --no-build-isolation --target "$work/$name" -C build-dir="$work/build-$name" \
        -C install.strip=false "$@" .
    local found
    found=$(PYTHONPATH="$work/$name" python -P -c 'import importlib.util; print(importlib.util.find_spec("batchnorm").origin)')
    if [[ $found != "$work"/* ]]; then
        echo "Python would import $found, not what was built here: no editable installation may be in the environment" >&2
        exit 1
    fi
}

address() {
    build kernels -C cmake.define.BATCHNORM_DEBUG=ON -C cmake.define.BATCHNORM_SANITIZE=address,undefined
    # Tests that measure memory or time would measure the sanitizer's. A child of a fork waits for ever if another thread
    # held the sanitizer's own lock.
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$work/kernels" \
        python -m pytest -q -m "not large and not measures" --deselect tests/test_forks.py \
        --deselect tests/test_plan.py::test_threads_and_children_of_a_fork_may_share_it "$@"
}

# libgomp's barriers are invisible to ThreadSanitizer, libomp's are told by Archer. clang instruments no access wider than 16
# bytes, and memcpy passes unseen between modules that are not instrumented, so both are spelled out for it.
thread() {
    local llvm=${LLVM:-/usr/lib/llvm-19} runtime
    runtime=$("$llvm/bin/clang" -print-file-name=libclang_rt.tsan-x86_64.so)
    CC=$llvm/bin/clang LDFLAGS="-fsanitize=thread -L$llvm/lib -Wl,-rpath,$llvm/lib" \
        CFLAGS="-fsanitize=thread -g -fno-omit-frame-pointer -fno-vectorize -fno-slp-vectorize -fno-builtin -include $PWD/tools/tsan.h" \
        build kernels -C cmake.build-type=None
    under() {
        PYTHONPATH="$work/kernels:tests:tests/support" OMP_TOOL_LIBRARIES="$llvm/lib/libarcher.so" LD_PRELOAD="$runtime" \
            TSAN_OPTIONS="ignore_noninstrumented_modules=1 history_size=7 halt_on_error=1 exitcode=66 external_symbolizer_path=$llvm/bin/llvm-symbolizer" \
            python "$@"
    }
    ARCHER_OPTIONS=verbose=1 under -c 'import batchnorm' 2>&1 | grep 'Archer detected'
    local level status
    for level in $(under -c 'from batchnorm import _kernels; print(*_kernels.available())'); do
        BATCHNORM_ISA=$level under tools/race.py
        status=0
        BATCHNORM_ISA=$level under tools/race.py --race > "$work/race.log" 2>&1 || status=$?
        if [ $status != 66 ] || ! grep -q 'ThreadSanitizer: data race' "$work/race.log"; then
            echo "$level: a deliberate race was not found (exit status $status)"
            cat "$work/race.log"
            exit 1
        fi
        echo "$level: no race, and a deliberate one is found"
    done
}

"$what" "$@"
