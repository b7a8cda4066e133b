"""The C++ compiler's flags for the CPU kernels. setup.py and mru_kernels/define run this file by its path."""

import platform

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fno-math-errno",  # so that calls of libm whose results are not used are dropped
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11
]
# Torch's and CUDA's libraries export parts of libstdc++: -lstdc++ before them and -Bsymbolic take none of theirs.
# --no-as-needed: the current CUDA stream is a weak symbol, which does not make the linker keep libtorch.
LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", "-lstdc++", "-ltorch", "-ltorch_cpu", "-lc10"]

#: The files of csrc/cpu that are compiled once for all cells.
CPU_PARTS = ("backward", "cut_maps", "forward", "isa", "plan", "register", "interleaved")

# csrc/cpu/kernels/kernels.cpp is compiled once per cell and instruction set, as csrc/cpu/kernels/kernels.h names it;
# csrc/cpu/isa.h chooses at run time.
ISA_FLAGS = {"kBaseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    # GCC 12 fuses the multiplications and additions of complex numbers that it vectorises itself, whatever the flags.
    _FMA = ["-mfma", "-fno-tree-vectorize"]
    ISA_FLAGS["kAvx2"] = ["-mavx2", "-mf16c", *_FMA]
    ISA_FLAGS["kAvx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", *_FMA]
    ISA_FLAGS["kAvx512"] += ["-Wno-uninitialized"]  # raised within GCC 12's own headers
