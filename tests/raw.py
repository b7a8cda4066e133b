"""Arguments of the ops `torch.ops.mru.*`: the only place in the tests that builds them and names their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import inputs
from mru_kernels import backends, ops

CELLS = {cell.name: cell for cell in ops.CELLS}
SAVED = ("checkpoints", "events")  # results of the forward op that the backward op takes


def gates_of(call: inputs.Call) -> Tensor | None:
    """The call's inputs as one tensor `[B, T, k D]`; None where one of them is `[D]`."""
    given = [t for name, t in call.tensors.items() if name not in ("alpha", "initial_state")]
    return torch.cat(given, -1) if all(t.dim() == 3 for t in given) else None


def scan(
    call: inputs.Call,
    *,
    gates: Tensor | None = None,
    chunk: int = backends.CHUNK,
    segment: int = 0,
    save: bool = True,
) -> dict[str, Any]:
    """Arguments of the forward op by name.

    Args:
        call: its tensors stand in the order of the cell's inputs.
        gates: the streams as one tensor.
        chunk: steps between checkpoints.
        segment: steps of a segment; 0: each sequence is scanned whole.
        save: whether a backward pass may follow.
    """
    given = {name: t for name, t in call.tensors.items() if name not in ("alpha", "initial_state")}
    streams = [t for t in given.values() if t.dim() == 3]
    settings = {"epsilon": 0.0, "surrogate_scale": 1.0, "reverse": False, "cu_seqlens": None} | call.settings
    return {
        "streams": streams if gates is None else [gates],
        "channel": [t for t in given.values() if t.dim() == 1],
        "alpha": call.tensors.get("alpha"),
        "initial_state": call.tensors.get("initial_state"),
        "cu_seqlens": settings["cu_seqlens"],
        "epsilon": torch.tensor(settings["epsilon"], dtype=torch.float64),
        "surrogate_scale": settings["surrogate_scale"],
        "reverse": settings["reverse"],
        "packed": 0 if gates is None else len(streams),
        "chunk": chunk,
        "segment": segment,
        "save": save,
    }


def backward(scan: dict[str, Any], results: list[Tensor]) -> dict[str, Any]:
    """Arguments of the backward op, of those of the forward op and its results, which stand for their gradients too."""
    h, final_state, *saved = results
    rest = {name: x for name, x in scan.items() if name != "save"}
    return {"grad_h": h, "grad_final": final_state} | rest | dict(zip(SAVED, saved, strict=True))


def step(call: inputs.Call) -> dict[str, Any]:
    """Arguments of the step op: the first step of a call."""
    rows = [
        t[:, 0] if t.dim() == 3 else t for name, t in call.tensors.items() if name not in ("alpha", "initial_state")
    ]
    state = call.tensors.get("initial_state")
    return {
        **dict(zip(("first", "second", "third"), [*rows, None, None][:3], strict=True)),
        "alpha": call.tensors.get("alpha"),
        "state": torch.zeros_like(call.grad_final) if state is None else state,
        "epsilon": call.settings.get("epsilon", 0.0),
    }


def run(op: torch._ops.OpOverload, arguments: dict[str, Any]) -> Any:
    """Call an op with arguments by name."""
    return op(*(arguments[argument.name] for argument in op._schema.arguments))


def stream_of(arguments: dict[str, Any]) -> Tensor:
    """The first stream of a scan or a step, or the tensor of all."""
    return arguments["first"] if "first" in arguments else arguments["streams"][0]


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that gradients are taken for, in the order of the backward op's results."""
    given = (arguments["alpha"], arguments["initial_state"])
    return [*arguments["streams"], *arguments["channel"], *(t for t in given if t is not None)]


def with_tensors(arguments: dict[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    """The arguments with other tensors for those of `tensors_of`."""
    left = iter(tensors)
    return arguments | {
        "streams": [next(left) for _ in arguments["streams"]],
        "channel": [next(left) for _ in arguments["channel"]],
        **{name: None if arguments[name] is None else next(left) for name in ("alpha", "initial_state")},
    }
