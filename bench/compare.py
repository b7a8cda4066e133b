"""Every cell and the softmax recurrence against the float64 reference: `python -m bench compare`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from . import cli, errors, inputs, records, softmax_cases
from .inputs import Call, Case
from .progress import tqdm
from .reference import CELLS

T = TypeVar("T")

FORWARD = ("h", "final_state", "boundaries")
REFERENCE = "reference"  #: as a backend: the plain loop in the state dtype


@dataclass(frozen=True)
class Result:
    """One result of a call: "h", "final_state", "boundaries", or a gradient, named "d" and its argument."""

    name: str
    error: float
    limit: float  # 0: equality is required
    passed: bool

    @property
    def share(self) -> float:
        """Error over limit. It ranks results with different limits."""
        return self.error / self.limit if self.limit else (0.0 if self.passed else math.inf)


@dataclass(frozen=True)
class Row:
    """One call on one backend. `failure` is the reason if there are no results."""

    cell: str
    backend: str
    dtype: str
    shape: tuple[int, ...]
    label: str
    results: tuple[Result, ...]
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and all(r.passed for r in self.results)


def run(
    cases: Iterable[Case | softmax_cases.Case | Call],
    backend: str,
    device: torch.device | str = "cpu",
    progress: bool = False,
    end: float = math.inf,
) -> list[Row]:
    """Compare each case, or call on given tensors, with the reference.

    Args:
        cases: what to run; see `bench.inputs.case`, `covering_cases`, `call` and `bench.softmax_cases`.
        backend: a name that the op takes, or "reference".
        device: where the backend runs; the reference runs on the CPU.
        progress: show a bar.
        end: value of `time.monotonic()` after which no case starts.

    Returns:
        A row per case. It has failed if the op raised.
    """
    in_time = takewhile(lambda _: time.monotonic() < end, tqdm(cases, backend, disable=not progress, leave=False))
    return [_row(item, backend, device) for item in in_time]


def _row(item: Case | softmax_cases.Case | Call, backend: str, device: torch.device | str) -> Row:
    call = item.to("cpu") if isinstance(item, Call) else item.build()
    results, failure = (), None
    try:
        got = results_of(call.to(device), _op(call.cell, backend))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        results = tuple(judge(call, got))
    dtype = str(call.stream.dtype).removeprefix("torch.")
    return Row(call.cell, backend, dtype, tuple(call.stream.shape), call.label, results, failure)


def judge(call: Call, got: dict[str, Tensor]) -> list[Result]:
    """Judge the results of an op for a call on the CPU.

    Args:
        call: the arguments.
        got: "h", "final_state", "boundaries" if they are returned, and the gradient of each of the call's tensors under
            its name.
    """
    wide = replace(call, tensors={name: errors.wide(t) for name, t in call.tensors.items()})  # so gradients are wide
    if call.cell == softmax_cases.OP:
        return _judge_softmax(call, got, results_of(wide, softmax_cases.reference))
    reference_op = CELLS[call.cell]
    state = reference_op.state_dtype(call.stream.dtype)
    reference = results_of(wide, partial(reference_op, state=state) if reference_op.rounds else reference_op)
    given = call.tensors | call.settings | grads_of(call)
    terms = reference_op.adjoint(**given, term=abs)
    float32_loop = cache(lambda: results_of(wide, partial(reference_op, dtype=torch.float32)))

    exact = is_exact(call)

    def result(name: str, dtype: torch.dtype) -> Result:
        forward = name in FORWARD
        label = name if forward else f"d {name}"
        if got[name].dtype != dtype or got[name].shape != reference[name].shape:
            return Result(label, math.inf, 0.0, False)
        if forward and exact:
            return Result(label, *errors.judge_exact(got[name], reference[name], terms[name], state))
        kept = ... if forward else _specified(call, reference, got[name])
        x, x_reference, x_terms = (results[name][kept] for results in (got, reference, terms))
        return Result(label, *errors.judge(x, x_reference, x_terms, lambda: float32_loop()[name][kept]))

    dtypes = dict(zip(outputs_of(call), (call.stream.dtype, state, state), strict=False))
    dtypes |= {name: t.dtype for name, t in call.tensors.items()}
    return [result(name, dtype) for name, dtype in dtypes.items()]


def _judge_softmax(call: Call, got: dict[str, Tensor], reference: dict[str, Tensor]) -> list[Result]:
    """The same for the softmax recurrence. Mean and log weight of a state are judged apart, and the worse counts."""
    state, heads = errors.state_dtype(call.stream.dtype), call.tensors["score"].shape[-1]
    dtypes = {"h": call.stream.dtype, "final_state": state} | {name: t.dtype for name, t in call.tensors.items()}
    results = []
    for name, dtype in dtypes.items():
        result, right = got[name], reference[name]
        label = name if name in FORWARD else f"d {name}"
        if result.dtype != dtype or result.shape != right.shape:
            results.append(Result(label, math.inf, 0.0, False))
            continue
        pairs = [(result, right)]
        if name == "final_state":
            pairs = list(zip(softmax_cases.split(result, heads), softmax_cases.split(right, heads), strict=True))
        error = max(errors.relative_error(x, expected, expected.abs()) for x, expected in pairs)
        limit = errors.LIMITS[dtype] * (8 if right.dim() == 1 else 1)  # gradients [H] are sums whose terms cancel
        results.append(Result(label, error, limit, error <= limit))
    return results


def is_exact(call: Call) -> bool:
    """Whether every backend's forward pass equals the reference on this call."""
    return CELLS[call.cell].rounds or errors.is_exact(
        epsilon=call.settings.get("epsilon"),
        amplitude="amplitude" in call.tensors,
        states=[t for name in ("initial_state", "reset_state") if (t := call.tensors.get(name)) is not None],
        time=call.stream.shape[1],
        state=CELLS[call.cell].state_dtype(call.stream.dtype).to_real(),
    )


def _specified(call: Call, reference: dict[str, Tensor], grad: Tensor) -> Tensor:
    """Where a gradient is specified: in channels of a sequence without a NaN."""
    ok, is_number, cu_seqlens = (
        ~reference["final_state"].isnan(),
        ~reference["h"].isnan(),
        call.settings.get("cu_seqlens"),
    )
    if cu_seqlens is None:
        ok &= is_number.all(1)
    else:
        parts = is_number[0].split(cu_seqlens.diff().tolist())
        ok &= torch.stack([part.all(0) for part in parts]) if parts else ok
    if grad.dim() == 1:
        return ok.all(0)
    if grad.dim() == 2:
        return ok
    if cu_seqlens is not None:
        return ok.repeat_interleave(cu_seqlens.diff().long(), 0).unsqueeze(0)
    return ok.unsqueeze(1).expand_as(grad)


def grads_of(call: Call) -> dict[str, Tensor | None]:
    """The gradients of the results of a call, as the reference takes them."""
    return {"grad_h": call.grad_h, "grad_final": call.grad_final, "grad_boundaries": call.grad_boundaries}


def outputs_of(call: Call) -> tuple[str, ...]:
    """The names of the results of a call's op."""
    return FORWARD if call.grad_boundaries is not None else FORWARD[:2]


def _op(cell: str, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    if backend != REFERENCE:
        import mru_kernels

        return partial(getattr(mru_kernels, cell), backend=backend)

    def reference(**arguments):
        dtype = next(iter(arguments.values())).dtype
        h, *states = CELLS[cell](**arguments, dtype=errors.state_dtype(dtype).to_real())
        return h.to(dtype), *states

    return reference


def results_of(call: Call, op: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The results of an op and the gradients, each under its argument's name, on the CPU."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    outputs = op(**leaves, **call.settings)
    given = [(y, g) for y, g in zip(outputs, grads_of(call).values(), strict=False) if g is not None]
    ys, gs = zip(*((y, g.to(y.dtype)) for y, g in given if y.requires_grad), strict=True)
    grads = torch.autograd.grad(ys, list(leaves.values()), gs)
    results = dict(zip(FORWARD, outputs, strict=False)) | dict(zip(leaves, grads, strict=True))
    return {name: t.detach().cpu() for name, t in results.items()}


# -------------------------------------------------------------------------------------------- command


def table(rows: Sequence[Row]) -> str:
    """A line per row with the worst forward result and the worst gradient, ranked by error over limit."""
    lines = [("cell", "backend", "dtype", "B,T,D", "options", "forward", "worst gradient", "")]
    failures = []
    for row in rows:
        shape = ",".join(map(str, row.shape))
        forward = gradient = ""
        if row.failure is not None:
            failures.append(f"{row.cell} {row.backend} {row.dtype} {shape} {row.label}: {row.failure}")
            forward = "raised, see below"
        else:
            forwards = [r for r in row.results if r.name in FORWARD]
            worst = max(row.results[len(forwards) :], key=lambda r: r.share)
            gradient = f"{_figures(worst)} {worst.name}"
            forward = _figures(max(forwards, key=lambda r: r.share))
        verdict = "PASS" if row.passed else "FAIL"
        lines.append((row.cell, row.backend, row.dtype, shape, row.label, forward, gradient, verdict))
    return "\n".join([records.aligned(lines), *failures])


def _figures(result: Result) -> str:
    if result.limit == 0:
        return "equal" if result.passed else f"{result.error:.1e}, not equal"
    return f"{result.error:.1e} of {result.limit:.0e}"


def to_record(rows: Sequence[Row]) -> dict:
    """The rows for a JSON file. An infinite error becomes None."""
    entries = [asdict(row) | {"passed": row.passed} for row in rows]
    for entry in entries:
        for result in entry["results"]:
            result["error"] = result["error"] if math.isfinite(result["error"]) else None
    return {"torch": torch.__version__, "rows": entries}


def backends_with_kernels(device: str) -> list[str]:
    """The backends that can run on `device`, without the loop over time in plain torch, which takes minutes."""
    from mru_kernels import available_backends
    from mru_kernels.backends import TABLE

    return [name for name, reason in available_backends(device).items() if reason is None and not TABLE[name].plain]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("compare"), description=__doc__)
    parser.add_argument("--backend", nargs="+", help="default: every backend that can run on the device")
    parser.add_argument("--dtype", nargs="+", choices=cli.DTYPES, default=list(cli.DTYPES))
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every error there")
    parser.add_argument("--brief", action="store_true", help="half of the cases: pairs of all factors except time")
    parser.add_argument("--part", type=cli.part, default=(1, 1), metavar="I/N", help="run part I of N of the cases")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no case after this time; exit with 1 if one is left"
    )
    parser.add_argument(
        "--cell", nargs="+", type=cli.defined_cell, metavar="MODULE:NAME", help="cells of define_cell, on the CPU only"
    )
    arguments = parser.parse_args(argv)
    if arguments.cell:
        found = [cell.compare() for cell in arguments.cell]
        print(*found, sep="\n\n")
        return 0 if all(one.passes for one in found) else 1

    names = arguments.backend or []
    if names != [REFERENCE]:
        import mru_kernels

        available = mru_kernels.available_backends(arguments.device)
        names = names or backends_with_kernels(arguments.device)
        if not names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in available.items())
            parser.error(f"--backend: none can run on {arguments.device} ({reasons})")
        for name in names:
            reason = available.get(name, "there is no such backend") if name != REFERENCE else None
            if reason is not None:
                parser.error(f"--backend: {name}: {reason}")
    cases = cases_of(arguments.dtype, arguments.brief)
    if REFERENCE not in names:  # whose loop in float32 keeps a log weight in one float
        cases += softmax_cases_of(arguments.dtype, arguments.brief)
    cases = part_of(cases, *arguments.part)
    end = time.monotonic() + arguments.seconds
    rows = [row for name in names for row in run(cases, name, arguments.device, progress=True, end=end)]
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    left = len(cases) * len(names) - len(rows)
    print(f"\n{len(rows)} calls, {failed} failed" + (f", no time for {left} more" if left else ""))
    if arguments.json:
        records.write_json(arguments.json, to_record(rows))
    return 1 if failed or left or not rows else 0


def cases_of(dtypes: Sequence[str], brief: bool) -> list[Case | softmax_cases.Case]:
    """The cases of every cell that takes a dtype."""
    select = inputs.brief_cases if brief else inputs.covering_cases
    cell_dtypes = [(cell, inputs.CELLS[cell].dtypes[dtype]) for cell in inputs.CELLS for dtype in dtypes
             if dtype in inputs.CELLS[cell].dtypes]  # fmt: skip
    return [case for cell, dtype in cell_dtypes for case in select(cell, dtype)]


def softmax_cases_of(dtypes: Sequence[str], brief: bool) -> list[softmax_cases.Case]:
    """The cases of the softmax recurrence, whose streams are real."""
    select = softmax_cases.brief_cases if brief else softmax_cases.covering_cases
    return [case for dtype in dtypes if dtype in inputs.DTYPES for case in select(inputs.DTYPES[dtype])]


def part_of(cases: list[T], index: int, count: int) -> list[T]:
    """Every `count`-th case. Parts start at different cells, so they seldom compile a kernel at the same time."""
    part = cases[index - 1 :: count]
    start = len(part) * (index - 1) // count
    return part[start:] + part[:start]
