"""Times of a cell's op and module, compared with a streaming pass over the same bytes and with peers.

`python -m bench speed` first checks the op on the call that it times (`bench.verify`), and each peer against the op. It
times only what passes. If a case fails, the others are still timed, and the exit status is 1.

The floor of a pass is the time of a streaming pass that moves each of its streams once, scaled from `torch.add(out=)`
in the same run. `torch.add` with a new output is timed too, because the op allocates its own.

On the CPU freed memory stays in the process (`python -m bench` pins the allocator's thresholds), so an output costs no
page faults. The op is also timed with glibc's default settings, in another process. Projections are a module's matrix
products alone, forward and backward. The cost of a call is measured on tiny inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from mru_kernels import backends
from mru_kernels.backends import CHUNK

from . import cli, inputs, verify
from .aside import Others
from .inputs import Call, Case, repeated
from .peer_checks import check_own_job, check_peer, op
from .peers import PEERS, timed_passes, versions
from .progress import tqdm
from .records import Figure, facts_of, machine, name_of, table_without_empty, write_json
from .report import summary
from .timing import measure, per_call
from .work import ADD, BOTH, FORWARD, GRU, NOISY, OWN_JOB, PROJECTIONS, floor_bytes, passes

SHAPES = ((4, 4096, 512), (1, 1048576, 16), (32, 1024, 64), (64, 128, 1024))
LINEAR = "linear_recurrence"  # the cell whose inputs are its gates, so peers' own jobs are compared with it
SMALL = (1, 1, 64)  # so small that the cost of a call dominates
_WIDEST_MODULE = 2048  # channels; beyond it the matrix products dominate a module's time
_PER_SUBJECT = 0.15  # seconds; see `bench.timing.measure`
_MOST_OF_GRU = (4096, 1024)  # steps and channels up to which torch.nn.GRU is timed

Key = tuple[str, str]  # subject and work
Subjects = dict[Key, Callable[[], object]]


def per_channel(case: Case) -> dict[str, Case]:
    """For each input that may be a stream or `[D]`, by name: the case in which it is `[D]`."""
    factors = inputs.CELLS[case.cell].factors
    names = [name for name, values in factors.items() if "channel" in values and case.options[name] == "stream"]
    return {name: replace(case, options={**case.options, name: "channel"}) for name in names}


@dataclass
class Results:
    """What is known so far: figures, and a line with the reason for each subject that failed or is left out."""

    figures: list[Figure] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @contextmanager
    def failures(self, where: str) -> Iterator[None]:
        """A context whose exception becomes a line of `failed`, so that the run goes on. Ctrl-C still ends it."""
        try:
            yield
        except Exception as error:
            self.failed.append(" ".join(f"FAIL {where}: {type(error).__name__}: {error}".split()))


def time_case(
    case: Case, backend: str, device: torch.device, results: Results, peers: Sequence[str] = (),
    others: Others | None = None,
) -> None:  # fmt: skip
    """Time op, module and peers on one case, and add figures, failures and subjects left out to `results`.

    Args:
        case: the inputs.
        backend: the name of the backend.
        device: where to run.
        results: what is known so far.
        peers: names of `PEERS`, or `GRU`.
        others: processes with other settings; None: no comparison and no times with other settings.
    """
    where = f"{case.shape} {_name(case.dtype)}"

    def checked(what: str, case: Case) -> Call | None:
        call = repeated(case).to(device)
        found = verify.faults(call, backend, partial(others.digest, call) if others else None)
        if found:
            results.failed.append(f"FAIL {where}: {what} is not timed: {'; '.join(found)}")
        return None if found else call

    call = checked(case.cell, case)
    if call is None:
        return
    subjects, moved = _streaming(call)
    calls = {case.cell: call}
    for name, other in per_channel(case).items():
        what = f"{case.cell}, {name} [D]"
        if (built := checked(what, other)) is not None:
            calls[what] = built
    for what, built in calls.items():
        subjects |= {(what, work): run for work, run in passes(built, op(built, backend)).items()}
        moved |= {(what, work): count for work, count in floor_bytes(built).items()}
    of_module, compared_with = _module_subjects(case, device, GRU in peers)
    subjects |= of_module
    if GRU in peers and GRU not in compared_with:
        steps, channels = _MOST_OF_GRU
        limits = f"up to {steps} steps and {channels} channels"
        results.left_out.append(f"{GRU} on {where}: timed with real modules only, {limits}")
    of_peers = _peer_subjects([name for name in peers if name != GRU], case, call, backend, results)
    subjects |= of_peers
    compared_with |= {subject: case.cell for subject, _ in of_peers}
    results.figures += _figures(call, measure(subjects, device, _PER_SUBJECT), moved, compared_with)
    if others is not None:
        results.figures += others.times(call)


def _peer_subjects(names: Sequence[str], case: Case, call: Call, backend: str, results: Results) -> Subjects:
    """The passes of peers in the same job and in their own. `results` gets those that fail or are left out."""
    subjects: Subjects = {}
    device, where = call.stream.device, f"{case.shape} {_name(case.dtype)}"
    for name, own in product(names, (False, True)):
        peer, subject = PEERS[name], f"{name}{OWN_JOB}" if own else name
        if own and not (case.cell == LINEAR and peer.has_own_job):
            continue
        reason = peer.why_not(case, device, own)
        if reason is not None:
            if not own or reason != peer.why_not(case, device):
                results.left_out.append(f"{subject} on {where}: {reason}")
            continue
        try:
            (check_own_job if own else check_peer)(name, call, backend)
            subjects |= {(subject, work): run for work, run in timed_passes(name, call, own).items()}
        except Exception as error:  # the other peers are still timed
            results.failed.append(" ".join(f"FAIL {where}: peer {subject!r} {error}; it is not timed".split()))
    return subjects


def _figures(
    call: Call, seconds: dict[Key, tuple[float, float]], moved: dict[Key, int], compared_with: dict[str, str]
) -> list[Figure]:
    """Figures from times.

    Args:
        call: the inputs.
        seconds: median and spread for each subject and work.
        moved: the bytes that each must move.
        compared_with: for a peer or a part of a module, the subject of ours whose time divides its time.
    """
    of_add, spread_of_add = seconds[ADD, FORWARD]
    add = of_add / moved[ADD, FORWARD]
    figures = []
    for (subject, work), (median, spread) in seconds.items():
        count = moved.get((subject, work))
        base, base_spread = seconds[compared_with[subject], work] if subject in compared_with else (None, spread_of_add)
        ratio = median / base if base else None
        part = subject.endswith(PROJECTIONS)
        figures.append(
            Figure(
                shape=tuple(call.stream.shape),
                dtype=_name(call.stream.dtype),
                subject=subject,
                work=work,
                ms=median * 1e3,
                spread=spread,
                gb_per_s=count / median / 1e9 if count else None,
                floor_ratio=median / (add * count) if count else None,
                base_spread=base_spread if count or base else None,
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

    The second result maps the projections and the GRU to the unit, which they are compared with. Both results are empty
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


def time_op(call: Call, backend: str) -> list[Figure]:
    """Time only torch.add and the op, with the allocator settings of this process."""
    subjects, moved = _streaming(call)
    subjects |= {(call.cell, work): run for work, run in passes(call, op(call, backend)).items()}
    moved |= {(call.cell, work): count for work, count in floor_bytes(call).items()}
    return _figures(call, measure(subjects, call.stream.device, _PER_SUBJECT), moved, {})


def _arguments(case: Case) -> list[str]:
    """The command-line options for the cell, shape and dtype of a case."""
    dtype = next(name for name, value in inputs.CELLS[case.cell].dtypes.items() if value == case.dtype)
    return ["--cell", case.cell, "--shape", ",".join(map(str, case.shape)), "--dtype", dtype]


def with_peak(figures: list[Figure], case: Case, backend: str, device: torch.device) -> list[Figure]:
    """The figures with the peak memory of the op's forward + backward, measured in another process."""
    from . import memory

    arguments = [*_arguments(case), "--device", str(device), "--backend", backend, "--chunk-size", str(CHUNK)]
    (seen,) = memory.in_own_process(arguments)
    peak, of = seen.peak_measured / 2**20, (case.shape, _name(case.dtype), case.cell, BOTH)
    return [replace(f, peak_mib=peak) if (f.shape, f.dtype, f.subject, f.work) == of else f for f in figures]


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
        return "" if value is None else format(value, form) + "?" * (max(f.spread, f.base_spread or 0.0) > NOISY)

    lines = [
        [
            *(name_of(f.shape), f.dtype, f.subject, f.work, f"{f.ms:.3g}", f"{f.spread:.0%}"),
            *(ratio(f, f.gb_per_s, ".1f"), ratio(f, f.floor_ratio, ".2f"), ratio(f, f.slower, ".3g")),
            *(ratio(f, f.share, ".0%"), "" if f.peak_mib is None else f"{f.peak_mib:.1f}"),
        ]
        for f in figures
    ]
    return table_without_empty(head, lines, 4)


def _caption(facts: dict[str, Any]) -> str:
    """What times and spreads in `table` are, and the settings of the allocator."""
    text = "Times are medians. The spread is the range between the quartiles, in percent of the median."
    return text + (f" Allocator: {facts['allocator']}." if "allocator" in facts else "")


def sweep(shape: tuple[int, int, int], letter: str) -> list[tuple[int, int, int]]:
    """Shapes whose size B, T or D, named by `letter`, is 1, 4, 16 and so on, up to that of `shape`."""
    i = "BTD".index(letter)
    sizes = [size for k in range(shape[i].bit_length()) if (size := 4**k) < shape[i]]
    return [(*shape[:i], size, *shape[i + 1 :]) for size in (*sizes, shape[i])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device, options = arguments.device, _options(parser, arguments)
    backend = cli.resolve(parser, arguments.backend, device).name
    sizes = [dict(zip(("batch", "time", "channels"), shape, strict=True)) for shape in arguments.shape]
    dtypes = [cli.DTYPES[dtype] for dtype in arguments.dtype]
    cases = [inputs.case(arguments.cell, dtype, **named, **options) for named in sizes for dtype in dtypes]
    results, calls, interrupted = Results(), {}, False
    try:
        with Others(backend) if device.type == "cpu" else nullcontext() as others:
            for case in tqdm(cases, "shapes", leave=False):
                known = len(results.figures)
                with results.failures(f"{case.shape} {_name(case.dtype)}"):
                    time_case(case, backend, device, results, arguments.peer, others)
                    if arguments.memory and len(results.figures) > known:
                        results.figures = with_peak(results.figures, case, backend, device)
                torch.compiler.reset()
        with results.failures("cost of a call"):
            calls = overhead(device, backend, arguments.cell)
    except KeyboardInterrupt:
        interrupted = True
    facts = machine(device) | versions(arguments.peer) | {"backend": backend, "cell": arguments.cell} | options
    record = {"machine": facts, "figures": [f.to_json() for f in results.figures], "microseconds": calls}
    record |= {"failed": results.failed, "left out": results.left_out} | ({"interrupted": True} if interrupted else {})
    if arguments.json:
        write_json(arguments.json, record)
    print(f"{facts_of(facts)}\n\n{table(results.figures)}\n\n{_caption(facts)}\n\n{summary(record)}")
    for lines in ([f"left out: {reason}" for reason in results.left_out], results.failed):
        print("\n".join(lines), end="\n" * bool(lines))
    if interrupted:
        print("interrupted: these are the figures until then", file=sys.stderr)
        return 130
    return 1 if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=cli.prog("speed"), description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=inputs.CELLS, default="bmru")
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=list(SHAPES), metavar="B,T,D")
    parser.add_argument("--sweep", choices="BTD", help="vary this size in powers of 4, up to that of the one --shape")
    parser.add_argument("--dtype", nargs="+", choices=cli.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    parser.add_argument("--epsilon", type=cli.epsilon, help="default: 0, for the cells that have one")
    parser.add_argument("--writes", choices=inputs.values_of("writes"), help="default: often, for the cells that write")
    parser.add_argument("--peer", nargs="*", choices=[*PEERS, GRU], default=[], help="peers (default: none)")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory of forward + backward")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, also after Ctrl-C")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the cases, and the shapes of a sweep in `arguments`. Ends the command if one is wrong."""
    if arguments.sweep:
        if len(arguments.shape) != 1:
            parser.error(f"--sweep: expected one --shape, got {len(arguments.shape)}")
        arguments.shape = sweep(arguments.shape[0], arguments.sweep)
    cli.check_dtypes(parser, arguments.cell, arguments.dtype)
    options, factors = {}, inputs.CELLS[arguments.cell].factors
    for name, given in (("epsilon", arguments.epsilon), ("writes", arguments.writes)):
        if name in factors:
            options[name] = factors[name][0] if given is None else given
        elif given is not None:
            parser.error(f"--{name}: {arguments.cell} has none")
    return options


if __name__ == "__main__":
    sys.exit(main())
