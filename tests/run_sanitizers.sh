#!/usr/bin/env bash
# Builds the extension with the address and undefined behaviour sanitizers, into a copy of the package, and runs the
# kernel tests on it.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/sanitize
compiler=${CXX:-g++}
rm -rf "$build/package"
mkdir -p "$build/package"
cp -r mru_kernels "$build/package/"
rm -f "$build"/package/mru_kernels/_C*.so
MRU_SANITIZE=1 MRU_FORCE_CUDA=0 python setup.py -q build_ext --build-lib "$build/package" --build-temp "$build/objects"

# Python itself is not instrumented, so LD_PRELOAD loads the runtime first, and libstdc++ with it, for its exceptions.
# Fresh memory is filled with NaN. An allocation that is too large fails, as it does without the sanitizers.
sanitized() {
  LD_PRELOAD="$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_malloc_fill_size=1000000000:malloc_fill_byte=255 UBSAN_OPTIONS=print_stacktrace=1 "$@"
}

# The sanitizers work: they stop a call whose alpha is longer than its memory.
control='
import ctypes, sys, numpy, torch
sys.path.insert(0, sys.argv[1])
import mru_kernels as mk
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.POINTER(ctypes.c_float)
short = torch.from_numpy(numpy.ctypeslib.as_array(malloc(4), (4096,)))
mk.bmru(torch.ones(1, 1, 4096), torch.ones(1, 1, 4096), alpha=short)
'
if found=$(sanitized python -c "$control" "$build/package" 2>&1) || [[ $found != *AddressSanitizer* ]]; then
  echo "the sanitizers did not report a read out of bounds:" "$found" >&2
  exit 1
fi

sanitized python -m pytest -q -p no:cacheprovider --capture=sys -o pythonpath="$build/package ." -n 2 --hypothesis-profile=brief \
  -m "not slow and not check" tests/test_op.py tests/test_op_layout.py tests/test_resets.py tests/test_slots.py tests/test_bad_input.py tests/test_bad_input_of_cells.py tests/test_bad_ops.py tests/test_hostile.py \
  tests/test_interleaved.py tests/test_softmax.py "$@"

# The CUDA kernels under host execution, without planted faults: the sanitizers end a run at the first fault.
if [[ $(uname -sm) == "Linux x86_64" ]]; then
  export MRU_SANITIZE=1
  MRU_SIMT_MODULE=$(python -c 'import sys; sys.path.insert(0, "tests"); import simt; print(simt.build(simt.FOLDER))')
  export MRU_SIMT_MODULE
  sanitized python -m pytest -q -p no:cacheprovider --capture=sys -n 2 tests/test_simt.py \
    -k "not fault"
  sanitized python -m pytest -q -p no:cacheprovider --capture=sys -n 2 --backend simt tests/test_hostile.py
fi
