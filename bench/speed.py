"""Times of a cell's op and module, compared with a streaming pass over the same bytes and with peers.

`python -m bench speed` first compares the op with the reference, and each peer with the op. It times only what passes.
The floor of a pass is the time of a streaming pass that moves each of its streams once. It is scaled from
`torch.add(out=)` in the same run. `torch.add` with a new output is timed too, because the op allocates its output.

On the CPU freed memory stays in the process (`python -m bench` pins the allocator's thresholds), so an output costs
no page faults. The op is also timed with glibc's default settings, in another process. The projections of a module
are its matrix products alone, forward and backward. The cost of a call is measured on tiny inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from mru_kernels import backends
from mru_kernels.backends import CHUNK

from . import allocator, cli, compare, errors, inputs
from .inputs import Call, Case
from .peers import PEERS, job
from .progress import tqdm
from .records import Figure, facts_of, machine, name_of, table_without_empty, write_json
from .timing import measure, per_call
from .work import ADD, BOTH, DEFAULT_ALLOCATOR, FORWARD, GRU, NOISY, PROJECTIONS, Passes, floor_bytes, passes

SHAPES = ((4, 4096, 512), (1, 1048576, 16), (32, 1024, 64), (64, 128, 1024))
SMALL = (1, 1, 64)  # so small that the cost of a call dominates
_CHECKED_STEPS = 256  # steps that are compared before anything is timed
_WIDEST_MODULE = 2048  # channels; beyond it the matrix products dominate a module's time
_MOST_OF_GRU = (4096, 1024)  # steps, channels
_MIB = 2**20

Key = tuple[str, str]  # subject and work
Subjects = dict[Key, Callable[[], object]]


def op(call: Call, backend: str | None) -> Callable[..., Tensor]:
    """A function that computes h by the op. It takes the call's tensors by name."""
    return lambda **tensors: getattr(mk, call.cell)(**tensors, **call.settings, backend=backend)[0]


def per_channel(case: Case) -> dict[str, Case]:
    """For each input that may be a stream or `[D]`, by name: the case in which it is `[D]`."""
    factors = inputs.CELLS[case.cell].factors
    names = [name for name, values in factors.items() if "channel" in values and case.options[name] == "stream"]
    return {name: replace(case, options={**case.options, name: "channel"}) for name in names}


def meets_limits(case: Case, backend: str, device: torch.device) -> bool:
    """Whether the op meets its limits against the reference, tested on a smaller case."""
    most = {"batch": 4, "time": _CHECKED_STEPS, "channels": 128}
    few = {name: min(case.options[name], size) for name, size in most.items()}
    return all(row.passed for row in compare.run([replace(case, options={**case.options, **few})], backend, device))


def check_peer(name: str, call: Call, backend: str | None = None) -> None:
    """Raise unless a peer gives h and the gradients of the op on the first steps of a call, in float32 or wider.

    Gradients are not compared if the peer does not give the whole gradient.
    """
    dtype = errors.state_dtype(call.stream.dtype)
    first = {name: (t[:, :_CHECKED_STEPS] if t.dim() == 3 else t).to(dtype) for name, t in call.tensors.items()}
    few = inputs.call(call.cell, first, call.settings)
    peer = PEERS[name]

    def results(f: Callable[..., Tensor]) -> dict[str, Tensor]:
        if not peer.whole:
            return {"h": f(**few.tensors)}
        leaves = {name: t.requires_grad_() for name, t in few.tensors.items()}
        h = f(**leaves)
        return {"h": h, **dict(zip(leaves, torch.autograd.grad(h, list(leaves.values()), few.grad_h), strict=True))}

    expected, got = results(op(few, backend)), results(job(peer, few))
    for what, x in expected.items():
        error = (got[what] - x).abs().max().item()
        if not error <= 1e-4 * (1 + x.abs().max().item()):  # a NaN is an error too
            place = "" if what == "h" else f": another gradient of {what}"
            raise RuntimeError(f"does not compute what {call.cell} computes{place}")


def time_case(
    case: Case, backend: str, device: torch.device, peers: Sequence[str] = ()
) -> tuple[list[Figure], list[str], list[str]]:
    """Time op, module and peers on one case.

    Returns:
        The figures; a line for each subject that failed its comparison; a line for each that is left out, with why.
    """
    failed: list[str] = []
    left_out: list[str] = []
    where = f"{case.shape} {_name(case.dtype)}"

    def meets(what: str, case: Case) -> bool:
        ok = meets_limits(case, backend, device)
        if not ok:
            failed.append(f"FAIL {where}: {what} does not meet its limits against the reference, so it is not timed")
        return ok

    if not meets(case.cell, case):
        return [], failed, left_out
    call = case.build().to(device)
    subjects, moved = _streaming(call)
    calls = {case.cell: call}
    for name, other in per_channel(case).items():
        what = f"{case.cell}, {name} [D]"
        if meets(what, other):
            calls[what] = other.build().to(device)
    for what, built in calls.items():
        subjects |= {(what, work): run for work, run in passes(built, op(built, backend)).items()}
        moved |= {(what, work): count for work, count in floor_bytes(built).items()}
    of_module, compared_with = _module_subjects(case, device, GRU in peers)
    subjects |= of_module
    if GRU in peers and GRU not in compared_with:
        steps, channels = _MOST_OF_GRU
        left_out.append(f"{GRU} on {where}: timed with real modules only, up to {steps} steps and {channels} channels")
    for name in (name for name in peers if name != GRU):
        reason = PEERS[name].why_not(case, device)
        if reason is not None:
            left_out.append(f"{name} on {where}: {reason}")
            continue
        try:
            check_peer(name, call, backend)
        except Exception as error:  # the other peers are still timed
            failed.append(" ".join(f"FAIL {where}: peer {name!r} {error}; it is not timed".split()))
            continue
        subjects |= _peer_subjects(name, call)
        compared_with[name] = case.cell
    return _figures(case, measure(subjects, device), moved, compared_with), failed, left_out


def _figures(
    case: Case, seconds: dict[Key, tuple[float, float]], moved: dict[Key, int], compared_with: dict[str, str]
) -> list[Figure]:
    """Figures from times.

    Args:
        case: the inputs.
        seconds: median and spread for each subject and work.
        moved: the bytes that each must move.
        compared_with: for a peer or a part of a module, the subject of ours that divides its time.
    """
    add = seconds[ADD, FORWARD][0] / moved[ADD, FORWARD]
    figures = []
    for (subject, work), (median, spread) in seconds.items():
        count = moved.get((subject, work))
        ratio = median / seconds[compared_with[subject], work][0] if subject in compared_with else None
        part = subject.endswith(PROJECTIONS)
        figures.append(
            Figure(
                shape=case.shape,
                dtype=_name(case.dtype),
                subject=subject,
                work=work,
                ms=median * 1e3,
                spread=spread,
                gb_per_s=count / median / 1e9 if count else None,
                floor_ratio=median / (add * count) if count else None,
                slower=None if part else ratio,
                share=ratio if part else None,
            )
        )
    return figures


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _streaming(call: Call) -> tuple[Subjects, dict[Key, int]]:
    """torch.add with a given output and with a new one, and the bytes that each moves."""
    one, other, out = (torch.ones_like(call.grad_h) for _ in range(3))
    subjects: Subjects = {
        (ADD, FORWARD): lambda: torch.add(one, other, out=out),
        ("torch.add", FORWARD): lambda: torch.add(one, other),
    }
    return subjects, dict.fromkeys(subjects, 3 * out.nbytes)


def _module_subjects(case: Case, device: torch.device, with_gru: bool) -> tuple[Subjects, dict[str, str]]:
    """The cell's unit with as many channels as the streams, its projections alone, and torch.nn.GRU.

    The second result maps the projections and the GRU to the unit, which they are compared with. There are no subjects
    for a cell without a unit, for complex streams and for more than `_WIDEST_MODULE` channels.
    """
    _, steps, channels = case.shape
    unit = inputs.CELLS[case.cell].unit
    if unit is None or case.dtype.is_complex or channels > _WIDEST_MODULE:
        return {}, {}
    kind = getattr(mk, unit)
    epsilon = {"epsilon": case.options["epsilon"]} if "epsilon" in case.options else {}
    module = kind(channels, channels, **epsilon, device=device, dtype=case.dtype)
    x, grad = (torch.randn(case.shape, device=device, dtype=case.dtype) for _ in range(2))
    weight, bias = module.weight_ih_l0, module.bias_ih_l0

    def both(f: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
        given = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(f(given), [given, *parameters], grad)

    name, part = kind.__name__, f"{kind.__name__}{PROJECTIONS}"
    subjects: Subjects = {
        (name, FORWARD): torch.no_grad()(lambda: module(x)),
        (name, BOTH): both(lambda x: module(x)[0], list(module.parameters()), grad),
        (part, BOTH): both(lambda x: F.linear(x, weight, bias), [weight, bias], grad.repeat(1, 1, len(module.gates))),
    }
    compared_with = {part: name}
    if with_gru and steps <= _MOST_OF_GRU[0] and channels <= _MOST_OF_GRU[1]:
        gru = torch.nn.GRU(channels, channels, batch_first=True, device=device, dtype=case.dtype)
        subjects[GRU, FORWARD] = torch.no_grad()(lambda: gru(x))
        subjects[GRU, BOTH] = both(lambda x: gru(x)[0], list(gru.parameters()), grad)
        compared_with[GRU] = name
    return subjects, compared_with


def _peer_subjects(name: str, call: Call) -> Subjects:
    works: Passes = passes(call, job(PEERS[name], call))
    subjects: Subjects = {(name, work): works[work] for work in ((FORWARD, BOTH) if PEERS[name].whole else (FORWARD,))}
    if PEERS[name].slow_at_first:
        for run in subjects.values():
            run()
    return subjects


def time_op(case: Case, backend: str, device: torch.device) -> list[Figure]:
    """Time only torch.add and the op, with the allocator settings of this process."""
    call = case.build().to(device)
    subjects, moved = _streaming(call)
    subjects |= {(case.cell, work): run for work, run in passes(call, op(call, backend)).items()}
    moved |= {(case.cell, work): count for work, count in floor_bytes(call).items()}
    return _figures(case, measure(subjects, device), moved, {})


def with_default_allocator(figures: list[Figure], case: Case, backend: str) -> list[Figure]:
    """The figures, and those of `time_op` in a process with glibc's default allocator settings."""
    options = {name: case.options[name] for name in ("epsilon", "writes") if name in case.options}
    command = [sys.executable, "-m", f"{__package__}.speed", "--here", "--backend", backend, *_arguments(case)]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, env=allocator.default())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    seen = [Figure.from_json(fields) for fields in json.loads(done.stdout)]
    return figures + [replace(f, subject=f.subject + DEFAULT_ALLOCATOR) for f in seen]


def _arguments(case: Case) -> list[str]:
    """The command-line options for the cell, shape and dtype of a case."""
    dtype = next(name for name, value in inputs.CELLS[case.cell].dtypes.items() if value == case.dtype)
    return ["--cell", case.cell, "--shape", ",".join(map(str, case.shape)), "--dtype", dtype]


def with_peak(figures: list[Figure], case: Case, backend: str, device: torch.device) -> list[Figure]:
    """The figures with the peak memory of the op's forward + backward, measured in another process."""
    from . import memory

    arguments = [*_arguments(case), "--device", str(device), "--backend", backend, "--chunk-size", str(CHUNK)]
    (seen,) = memory.in_own_process(arguments)
    peak = seen.peak_measured / _MIB
    return [replace(f, peak_mib=peak) if (f.subject, f.work) == (case.cell, BOTH) else f for f in figures]


def overhead(device: torch.device, backend: str, cell: str = "bmru") -> dict[str, float]:
    """Microseconds per call on tiny inputs."""

    def tensors(channels: int) -> dict[str, Tensor]:
        return inputs.case(cell, torch.float32, batch=1, time=1, channels=channels).build().to(device).tensors

    small, wide = tensors(SMALL[2]), tensors(512)
    leaves = {name: t.clone().requires_grad_() for name, t in small.items()}
    one = {name: t[:, 0] if t.dim() == 3 else t for name, t in wide.items()}
    state, stream = torch.zeros(1, 512, device=device), next(iter(small.values()))
    scan, step = getattr(mk, cell), getattr(mk, f"{cell}_step")
    with patch.object(backends, "_CHOSEN", backend):  # a step takes no backend
        return {
            "torch.add": per_call(lambda: torch.add(stream, stream)) * 1e6,
            f"{cell} {SMALL}, no gradient": per_call(lambda: scan(**small)) * 1e6,
            f"{cell} {SMALL}, forward with gradient": per_call(lambda: scan(**leaves)) * 1e6,
            f"{cell}_step (1, 512)": per_call(lambda: step(**one, state=state)) * 1e6,
        }


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table without empty columns."""
    head = ["B, T, D", "dtype", "subject", "work", "ms", "spread", "GB/s", "time / floor", "times slower than ours"]
    head += ["share of the module", "peak, MiB"]

    def ratio(f: Figure, value: float | None, form: str) -> str:
        return "" if value is None else format(value, form) + "?" * (f.spread > NOISY)

    lines = [
        [
            *(name_of(f.shape), f.dtype, f.subject, f.work, f"{f.ms:.3g}", f"{f.spread:.0%}"),
            *(ratio(f, f.gb_per_s, ".1f"), ratio(f, f.floor_ratio, ".2f"), ratio(f, f.slower, ".3g")),
            *(ratio(f, f.share, ".0%"), "" if f.peak_mib is None else f"{f.peak_mib:.1f}"),
        ]
        for f in figures
    ]
    return table_without_empty(head, lines, 4)


def sweep(shape: tuple[int, int, int], letter: str) -> list[tuple[int, int, int]]:
    """Shapes whose size B, T or D, named by `letter`, is 1, 4, 16 and so on, up to that of `shape`."""
    i = "BTD".index(letter)
    sizes = [size for k in range(shape[i].bit_length()) if (size := 4**k) < shape[i]]
    return [(*shape[:i], size, *shape[i + 1 :]) for size in (*sizes, shape[i])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("speed"), description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=inputs.CELLS, default="bmru")
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=list(SHAPES), metavar="B,T,D")
    parser.add_argument("--sweep", choices="BTD", help="vary this size in powers of 4, up to that of the one --shape")
    parser.add_argument("--dtype", nargs="+", choices=cli.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    parser.add_argument("--epsilon", type=cli.epsilon, help="default: 0, for the cells that have one")
    parser.add_argument("--writes", choices=inputs.values_of("writes"), help="default: often, for the cells that write")
    parser.add_argument("--peer", nargs="*", choices=[*PEERS, GRU], default=[], help="peers to time (default: none)")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory of forward + backward")
    parser.add_argument("--here", action="store_true", help="time only the op, in this process, and print JSON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    cell, device = arguments.cell, arguments.device
    if arguments.sweep:
        if len(arguments.shape) != 1:
            parser.error(f"--sweep: expected one --shape, got {len(arguments.shape)}")
        arguments.shape = sweep(arguments.shape[0], arguments.sweep)
    cli.check_dtypes(parser, cell, arguments.dtype)
    options = {}
    for name, given in (("epsilon", arguments.epsilon), ("writes", arguments.writes)):
        if name in inputs.CELLS[cell].factors:
            options[name] = inputs.CELLS[cell].factors[name][0] if given is None else given
        elif given is not None:
            parser.error(f"--{name}: {cell} has none")
    backend = cli.resolve(parser, arguments.backend, device).name
    figures: list[Figure] = []
    failed: list[str] = []
    left_out: list[str] = []
    sizes = [dict(zip(("batch", "time", "channels"), shape, strict=True)) for shape in arguments.shape]
    cases = [inputs.case(cell, cli.DTYPES[dtype], **named, **options) for named in sizes for dtype in arguments.dtype]
    if arguments.here:
        print(json.dumps([f.to_json() for case in cases for f in time_op(case, backend, device)]))
        return 0
    for case in tqdm(cases, "shapes", leave=False):
        timed, wrong, omitted = time_case(case, backend, device, arguments.peer)
        if arguments.memory and timed:
            timed = with_peak(timed, case, backend, device)
        if device.type == "cpu" and timed:
            timed = with_default_allocator(timed, case, backend)
        figures += timed
        failed += wrong
        left_out += omitted
        torch.compiler.reset()
    calls = overhead(device, backend, cell)
    facts = machine(device) | {"backend": backend, "cell": cell} | options
    print(facts_of(facts), end="\n\n")
    print(table(figures), end="\n\n")
    print("\n".join(f"{k}: {v:.1f} us per call" for k, v in calls.items()))
    for lines in ([f"left out: {reason}" for reason in left_out], failed):
        print("\n".join(lines), end="\n" * bool(lines))
    if arguments.json:
        record = {"machine": facts, "figures": [f.to_json() for f in figures], "microseconds": calls}
        record |= {"failed": failed, "left out": left_out}
        write_json(arguments.json, record)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
