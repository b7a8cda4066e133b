"""Other implementations, timed on two jobs. Each is checked before it is timed: `bench.peer_checks`.

The *same job* is that of a cell: gates, scan and gradients. A peer scans a and w, each `[B, T, D]`:
s_t = a_t s_{t-1} + w_t. The cell's affine form (`python_ref.Cell.affine`) computes both in plain torch, with surrogate
derivatives. Autograd computes the gradients. Each package gets the layout that it needs. The conversion is timed too.

A peer's *own job* is its scan alone, with the gates given in its own layout. Its time is compared with that of
`linear_recurrence` on the same numbers, which gets its gates too. If a peer's layout is `[B, T, D]`, both jobs are one.

mlstm_kernels is not a peer: the mLSTM divides its output by a normaliser, so it cannot give these results.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from . import scans
from .inputs import Call, Case
from .reference import CELLS
from .scans import Scan
from .work import BOTH, FORWARD, Passes, passes

# -------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """The layout of a scan's arguments and result.

    Attributes:
        stream: x `[B, T, D]` -> the same values as the scan takes them.
        back: (s as the scan returns it, the shape (B, T, D)) -> s `[B, T, D]`.
        log: whether the scan takes log a instead of a.
    """

    stream: Callable[[Tensor], Tensor] = lambda x: x
    back: Callable[[Tensor, torch.Size], Tensor] = lambda s, _: s
    log: bool = False

    def gates(self, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The streams a and w, `[B, T, D]`, as the scan takes them."""
        return self.stream(a.log() if self.log else a), self.stream(w)


OURS = Layout()
CHANNELS_FIRST = Layout(lambda x: x.transpose(1, 2).contiguous(), lambda s, _: s.transpose(1, 2))
ROWS = Layout(  # [B D, T]
    lambda x: x.transpose(1, 2).flatten(0, 1).contiguous(),
    lambda s, shape: s.unflatten(0, (shape[0], shape[2])).transpose(1, 2),
)
LOG_GATES = Layout(lambda x: x.contiguous(), log=True)

# ---------------------------------------------------------------------------------------------- peers


@dataclass(frozen=True)
class Peer:
    """One implementation and its limits.

    Attributes:
        scan: a, w -> s, in its layout.
        layout: the layout that its scan takes.
        own: (a, w, gradient of s), each `[B, T, D]` -> the passes of its own job, if the scan does not take tensors.
        compiled: whether torch.compile compiles it, with the gates.
        epsilon: the only epsilon that it computes; None: any.
        decays: "all", "real" or "positive": the values of a that it takes.
        whole: whether it gives the gradients of both a and w, for every a.
        needs: packages that it imports and this package does not.
        only_on: the only type of device that it runs on; None: any.
        most_steps: the longest T that it takes or that is timed; None: any.
        power_of_2: whether T must be a power of 2.
        without: dtypes that it does not take.
    """

    scan: Scan
    layout: Layout = OURS
    own: Callable[[Tensor, Tensor, Tensor], Passes] | None = None
    compiled: bool = False
    epsilon: float | None = None
    decays: str = "all"
    whole: bool = True
    needs: tuple[str, ...] = ()
    only_on: str | None = None
    most_steps: int | None = None
    power_of_2: bool = False
    without: tuple[torch.dtype, ...] = ()

    def __call__(self, a: Tensor, w: Tensor) -> Tensor:
        """Scan a and w, `[B, T, D]`, to s `[B, T, D]`."""
        return self.layout.back(self.scan(*self.layout.gates(a, w)), w.shape)

    @property
    def has_own_job(self) -> bool:
        """Whether its own job differs from the same job on `linear_recurrence`."""
        return self.own is not None or self.layout is not OURS

    def own_passes(self, a: Tensor, w: Tensor, grad: Tensor) -> Passes:
        """The passes of its own job, from a, w and the gradient of s, each `[B, T, D]`."""
        if self.own is not None:
            return self.own(a, w, grad)
        given = [t.detach() for t in self.layout.gates(a, w)]
        leaves = [t.clone().requires_grad_() for t in given]
        own_grad = self.layout.stream(grad)
        return {
            FORWARD: lambda: self.scan(*given),
            BOTH: lambda: torch.autograd.grad(self.scan(*leaves), leaves, own_grad),
        }

    def why_not(self, case: Case, device: torch.device, own: bool = False) -> str | None:
        """The reason to leave it out; None if it can run. Its own job has the decays that it needs: see `own_call`."""
        compilers = ("triton",) if self.compiled and device.type == "cuda" else ()
        missing = [name for name in (*self.needs, *compilers) if find_spec(name) is None]
        if self.compiled and device.type == "cpu" and shutil.which("g++") is None:
            missing.append("g++")
        if missing:
            return f"{', '.join(missing)} not installed"
        if self.epsilon not in (None, case.options.get("epsilon")):
            return f"epsilon {self.epsilon:g} only"
        if CELLS[case.cell].affine is None:
            return "no affine form declared"
        is_complex = self.decays != "all" and case.dtype.is_complex
        if is_complex or (self.decays == "positive" and not own and _has_negative(case)):
            return f"{self.decays} decays only"
        if self.only_on not in (None, device.type):
            return f"runs on {self.only_on} only"
        if self.most_steps is not None and case.shape[1] > self.most_steps:
            return f"up to {self.most_steps} steps only"
        if self.power_of_2 and case.shape[1].bit_count() != 1:
            return "a power of 2 of steps only"
        if case.dtype in self.without:
            return f"does not take {case.dtype}"
        return None

    @property
    def slow_at_first(self) -> bool:
        """Whether the first call on a shape compiles. That call is not timed."""
        return self.compiled or bool({"jax", "ninja"} & set(self.needs))


def _has_negative(case: Case) -> bool:
    """Whether a small case of the same kind has negative decays."""
    few = replace(case, options={**case.options, "batch": 2, "time": 64, "channels": 64}).build()
    reference = CELLS[case.cell]
    decays, _ = reference.affine(**dict.fromkeys(reference.optional), **few.tensors, **few.settings)
    return bool((decays < 0).any())


@cache
def _job(peer: Peer, cell: str, **settings: float) -> Callable[..., Tensor]:
    reference = CELLS[cell]

    def job(**tensors: Tensor) -> Tensor:
        given = {**dict.fromkeys(reference.optional), **tensors, **settings}
        return reference.output(peer(*reference.affine(**given)), **given)

    return torch.compile(job, dynamic=False) if peer.compiled else job


def job(peer: Peer, call: Call) -> Callable[..., Tensor]:
    """A function that computes h by the peer. It takes the call's tensors by name."""
    return _job(peer, call.cell, **{name: x for name, x in call.settings.items() if name != "reverse"})


def own_call(peer: Peer, call: Call) -> Call:
    """The call of `linear_recurrence` for a peer's own job: with positive decays if the peer needs them."""
    if peer.decays != "positive":
        return call
    return replace(call, tensors=call.tensors | {"decay": call.tensors["decay"].abs().clamp_min(2.0**-10)})


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of the installed packages that peers need, by the names of their distributions."""
    needed = {package for name in names if name in PEERS for package in PEERS[name].needs}
    found = metadata.packages_distributions() if needed else {}
    return {dist: metadata.version(dist) for package in sorted(needed) for dist in sorted(set(found.get(package, ())))}


_HALVES = (torch.float16, torch.bfloat16)

#: The fast ones come first, because the last are left out if time runs out.
PEERS: dict[str, Peer] = {
    "accelerated_scan, Triton": Peer(
        scans.accelerated_scan_triton, CHANNELS_FIRST, decays="real", needs=("accelerated_scan", "triton"),
        only_on="cuda",
    ),
    "fla HGRN": Peer(
        scans.fla_hgrn, LOG_GATES, decays="positive", whole=False, needs=("fla", "triton"), only_on="cuda"
    ),
    "fpscan": Peer(
        scans.fpscan, CHANNELS_FIRST, decays="real", needs=("fpscan",), only_on="cuda", most_steps=65536,
        power_of_2=True, without=(torch.float64,),
    ),
    "PhilTorch": Peer(scans.philtorch, ROWS, needs=("philtorch",), without=_HALVES),
    "cumsum": Peer(scans.cumsum, epsilon=1.0),
    "cummax + gather": Peer(scans.cummax, epsilon=0.0, whole=False),
    "associative_scan": Peer(scans.associative_scan),
    "log-step scan": Peer(scans.log_step),
    "mingru-scans": Peer(scans.mingru_linear_scan, needs=("mingru",)),
    "JAX associative_scan": Peer(
        scans.jax_associative_scan, own=partial(scans.jax_passes, scans.in_jax_associative_scan), needs=("jax",),
        only_on="cpu",
    ),
    "JAX scan": Peer(scans.jax_scan, own=partial(scans.jax_passes, scans.in_jax_scan), needs=("jax",), only_on="cpu"),
    "python loop": Peer(scans.python_loop, most_steps=4096),
    "accelerated_scan, CUDA": Peer(
        scans.accelerated_scan_warp, CHANNELS_FIRST, decays="real", needs=("accelerated_scan", "ninja"), only_on="cuda",
        power_of_2=True,
    ),
    "associative_scan, compiled": Peer(scans.pointwise_scan, compiled=True, decays="real", only_on="cuda"),
    "log-step scan, compiled": Peer(scans.log_step, compiled=True, decays="real"),
    "python loop, compiled": Peer(scans.python_loop, compiled=True, decays="real", most_steps=128),
}  # fmt: skip


def timed_passes(name: str, call: Call, own: bool = False) -> Passes:
    """The passes of a peer that are timed, by name: those of the same job, or those of its own.

    The passes of a peer that compiles at first, or needs another package, have run once: if they fail, they fail here.
    """
    peer = PEERS[name]
    if own:
        given = own_call(peer, call)
        works = peer.own_passes(given.tensors["decay"], given.tensors["update"], given.grad_h)
    else:
        works = passes(call, job(peer, call))
    works = {work: works[work] for work in ((FORWARD, BOTH) if peer.whole else (FORWARD,))}
    if peer.slow_at_first or peer.needs:
        for run in works.values():
            run()
    return works
