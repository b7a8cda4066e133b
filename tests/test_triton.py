"""The Triton backend without a GPU: its kernels interpreted on the CPU, and compiled for devices that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mru_kernels.backends import CHUNK
from mru_kernels.backends import triton as backend
from mru_kernels.ops import CELLS
from tests import sass, triton_offline, triton_variants

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]

# Of tests/test_op.py, the tests that fit the time; the rest of it has not been run to its end under the interpreter.
OF_EVERY_BACKEND = [
    "test_equals_the_reference",
    "test_reverse_equals",
    "test_packed_sequences",
    "test_no_sequence",
    "test_strides",
    "test_steps",
]

# Of a lane, the most that Triton 3.9 or 3.6 takes. An NVIDIA multiprocessor's 65536 are for 12 warps with up to 168,
# else for 8.
REGISTERS = {"forward": 168, "summarize": 168, "summarize_adjoint": 168, "fold": 168, "carry": 192, "backward": 168}
REGISTERS |= {"check": 96}
# Of `backward`, which holds two tiles, of steps that do not compose, and of adjoints with gates in float64: only spills
# can fail.
REGISTERS_HALF = 255
REGISTERS_FP64 = 208
REGISTERS_AMD = 168


def test_under_the_interpreter():
    """A few examples of what every backend passes, and what is Triton's own, where TRITON_INTERPRET is set in time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.interpreter"]
    command += ["--backend", "triton", "--hypothesis-profile=interpreted", "--durations=10"]
    command += [
        "tests/test_op.py",
        "tests/test_op_layout.py",
        "tests/test_slots.py",
        "tests/triton_interpreted.py",
        "tests/triton_faults.py",
    ]
    command += ["-k", " or ".join(["interpreted", "faults", *OF_EVERY_BACKEND])]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are not compiled then")
def test_compiled_for_devices():
    """Nothing spilled, no more registers than intended, rows in whole vectors, no barrier, and channels in one lane."""
    rows = triton_offline.reports()
    print(triton_offline.table(rows))
    failed = {}
    for r in rows:
        v = r.variant
        most = REGISTERS_FP64 if v.state == "fp64" else REGISTERS[v.kernel]
        half = triton_variants.BYTES[v.element] == 2
        if half and (v.kernel == "backward" or (v.kernel == "forward" and not v.spec.composes)):
            most = REGISTERS_HALF
        if v.functions.gated.value and v.state == "fp64" and v.kernel in ("backward", "summarize_adjoint"):
            most = REGISTERS_HALF
        if v.arch.startswith("gfx"):
            most = REGISTERS_AMD
        # a complex state under real streams: two neighbours read one element, which one hands to the other
        shares = v.spec.complex_state
        bad = {
            "spilled": r.spilled > 0,
            "registers": r.registers > most,
            "barriers": (r.barriers > 0 or r.shared > 0) and not shares,
            # rows of states have another layout than those of half-precision streams; and lanes agree when to stop and
            # share a flag
            "shuffles": r.shuffles > 0
            and triton_variants.BYTES[v.element] > 2
            and not (v.stops or v.kernel == "check" or shares),
            "rows not loaded whole": v.row_bits and r.wide_loads < triton_offline.rows_read(v),
            # a lane's codes are 8 bytes if its streams are fp64; a flag is one number
            "narrow stores": v.row_bits
            and r.stores - r.wide_stores > 2 * (v.dtype == "fp64" and v.codes) + (v.kernel in ("carry", "check")),
        }
        if any(bad.values()):
            failed[f"{v.name} {v.arch}"] = [name for name, is_bad in bad.items() if is_bad]
    assert not failed, failed


@pytest.mark.parametrize(("itemsize", "warps"), [(2, 8), (4, 12)])
@pytest.mark.parametrize(
    "shape",
    [(8, 4096, 2048), (32, 2048, 512), (1, 1048576, 64), (1, 1048576, 512), (3, 100_000, 1000), (1, 999_999, 1)],
)
def test_the_backward_pass_leaves_no_round_half_empty(shape, itemsize, warps):
    batch, time, channels = shape
    steps = backend.adjoint_segment(batch, batch * time, channels, itemsize, torch.device("cpu"))
    assert steps % CHUNK == 0
    programs = batch * -(-channels // 128) * -(-time // steps)
    rounds = programs / (warps * 132)
    assert rounds / -(-rounds // 1) > 0.85


def test_the_backward_pass_cuts_time_in_its_own_way_unless_a_segment_is_given():
    sizes, cpu = (1, 2**20, 64), torch.device("cpu")
    own, of_forward = backend.adjoint_segment(*sizes, 2, cpu), backend.segment(*sizes, 2, cpu)
    assert own != of_forward
    assert backend.backward_segment(of_forward, sizes, 2, cpu) == own
    assert backend.backward_segment(of_forward + CHUNK, sizes, 2, cpu) == of_forward + CHUNK
    assert backend.backward_segment(0, sizes, 2, cpu) == 0


@pytest.fixture
def requested(monkeypatch):
    """What launches ask Triton to compile, with no device to run it on: (kernel, signature, constants, alignments)."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Device:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    asked = []

    def refuse(*, fn, compile, **_):
        attrs = {path: value for path, value in compile["configs"][0].items() if value}
        asked.append((fn.jit_function.fn.__name__, str(compile["signature"]), str(compile["constants"]), str(attrs)))
        return True  # do not compile

    monkeypatch.setattr(driver, "_active", Device())
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", refuse)
    return asked


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are not compiled then")
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="its hooks fail where a function is an argument")
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_are_not_compiled_in(requested, cell, segment, resets):
    """One set of variants for any sizes, flags and strides, as long as rows stay aligned."""
    from mru_kernels.backends.triton import ops
    from mru_kernels.backends.triton.cell import find
    from mru_kernels.ops import ALL_WANTED

    spec = CELLS[cell]
    dtype = torch.complex64 if torch.complex64 in spec.dtypes else torch.bfloat16
    for batch, time, channels, reverse, packed in (
        (1, 64, 256, False, False),
        (2, 1, 264, True, False),
        (3, 1000, 1024, False, False),
        (1, 333, 16 * 33, True, True),
    ):
        streams = [i for i in spec.inputs if i.kind != "channel" and not i.optional]
        vectors = [i for i in spec.inputs if i.kind == "channel" and not (i.optional and packed)]
        tensors = [torch.empty(batch, time, channels, dtype=dtype) for _ in streams]
        tensors += [torch.empty(channels, dtype=torch.complex64 if i.complex else torch.float32) for i in vectors]
        scalars = [torch.tensor(0.5, dtype=torch.float64) for _ in spec.scheduled]
        given = spec.mask(*(i.name for i in (*streams, *vectors)), *(s.name for s in spec.scheduled))
        cu_seqlens = torch.tensor([0, 5, time]) if packed else None
        numbers = [1.0] * len(spec.numbers)
        states = torch.empty(2 if packed else batch, channels, dtype=spec.state_dtype(dtype))
        given_resets = (torch.zeros(batch, time, dtype=torch.bool), states) if resets else (None, None)
        call = ([*tensors, *scalars], given, 0, numbers, None, cu_seqlens, *given_resets, reverse, CHUNK, segment)
        _, _, checkpoints, codes = ops.forward(spec, *call, True)
        ops.backward(spec, tensors[0], states, checkpoints if resets else None, *call, checkpoints, codes, ALL_WANTED)
    assert not any("i32'" in signature.replace("*i32'", "") for _, signature, *_ in requested)
    kernels = {name for name, *_ in requested}
    adjoint = set() if find(cell).real.adjoint_sees_state.value else {"summarize_adjoint"}
    adjoint |= {"summarize", "carry", "check"}
    adjoint = adjoint if segment and spec.composes else set()
    assert kernels == {"forward", "backward"} | adjoint | ({"fold"} if resets else set())
    assert len(set(requested)) == len(kernels)


def test_instructions_are_counted_run_by_run():
    listing = """
.text.kernel:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0010*/              @!P0 FSEL R3, R1, RZ, P1 ;
        /*0020*/              @UP0 BRA `(.L_x_1) ;
        /*0030*/                   LOP3.LUT R4, R3, R1, RZ, 0xfc, !PT ;
.L_x_1:
        /*0040*/                   EXIT ;
"""
    expected = [{"IMAD": 1, "FSEL": 1, "BRA": 1}, {"LOP3": 1}, {"EXIT": 1}]
    assert [dict(run) for run in sass.runs(listing) if run] == expected
