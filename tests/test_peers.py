"""Peers do the jobs that they are timed on: the same job as the op, and their own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from bench import inputs, peer_checks, peers, scans, work

CPU = torch.device("cpu")
CELLS = [
    (cell, epsilon)
    for cell, declared in inputs.CELLS.items()
    for epsilon in ((0.0, 1.0) if "epsilon" in declared.factors else (None,))
]


def case(cell: str, epsilon: float | None = None, dtype: torch.dtype = torch.float32, **sizes: int) -> inputs.Case:
    given = {} if epsilon is None else {"epsilon": epsilon}
    return inputs.case(cell, dtype, **{"batch": 2, "time": 20, "channels": 5} | sizes, **given)


@pytest.mark.parametrize(("cell", "epsilon"), CELLS)
@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if not peer.compiled])
def test_a_peer_does_the_same_job(name, cell, epsilon):
    """Results of a peer, and gradients of a whole peer, equal ours. A wrong peer is detected."""
    for dtype in {torch.float32, torch.complex64} & set(inputs.CELLS[cell].dtypes.values()):
        given = case(cell, epsilon, dtype)
        if peers.PEERS[name].why_not(given, CPU) is None:
            call = given.build()
            peer_checks.check_peer(name, call)
            right = peers.PEERS[name]
            wrong = peers.Peer(lambda a, w, right=right: right(a, w) * 1.01, whole=False)
            with patch.dict(peers.PEERS, {name: wrong}), pytest.raises(RuntimeError, match="does not compute"):
                peer_checks.check_peer(name, call)


OWN_JOBS = {
    "channels first": peers.Peer(
        lambda a, w: in_rows(a.flatten(0, 1), w.flatten(0, 1)).view_as(w), peers.CHANNELS_FIRST
    ),
    "rows": peers.Peer(lambda a, w: in_rows(a, w), peers.ROWS),
    "log gates": peers.Peer(lambda log_a, w: scans.python_loop(log_a.exp(), w), peers.LOG_GATES, decays="positive"),
} | {name: peer for name, peer in peers.PEERS.items() if peer.has_own_job}


def in_rows(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A scan of `[rows, T]`, both contiguous."""
    assert a.is_contiguous()
    assert w.is_contiguous()
    return scans.python_loop(a.unsqueeze(-1), w.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", OWN_JOBS)
def test_a_peers_own_job_is_the_linear_recurrence(name):
    peer = OWN_JOBS[name]
    cases = [case("linear_recurrence", dtype=dtype) for dtype in (torch.float32, torch.complex64)]
    reasons = [peer.why_not(given, CPU, own=True) for given in cases]
    if None not in reasons:
        pytest.skip(reasons[0])
    for given, reason in zip(cases, reasons, strict=True):
        if reason is None:
            with patch.dict(peers.PEERS, {name: peer}):
                peer_checks.check_own_job(name, given.build())


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("timed", "which"), [(work.FORWARD, 0), (work.BOTH, 0), (work.BOTH, 1)])
def test_a_fault_in_the_passes_of_an_own_job_is_found(timed, which, log):
    """Only these passes have the fault, in h or in a gradient, and not the scan."""
    right = OWN_JOBS["log gates" if log else "rows"]

    class Wrong(peers.Peer):
        def own_passes(self, a, w, grad):
            works = super().own_passes(a, w, grad)
            right_pass = works[timed]

            def changed():
                found = right_pass()
                if isinstance(found, torch.Tensor):
                    return found * 1.01
                return [x * 1.01 if i == which else x for i, x in enumerate(found)]

            return works | {timed: changed}

    wrong = Wrong(right.scan, right.layout, decays=right.decays)
    reason = "computes" if timed == work.FORWARD else f"another gradient of {('decay', 'update')[which]}"
    with patch.dict(peers.PEERS, {"wrong": wrong}), pytest.raises(RuntimeError, match=f"{reason}$"):
        peer_checks.check_own_job("wrong", case("linear_recurrence").build())


@pytest.mark.check
@pytest.mark.parametrize("name", ["log-step scan, compiled", "python loop, compiled"])
def test_a_compiled_peer_does_the_same_job(name):
    torch.compiler.reset()
    peer_checks.check_peer(name, case("bmru", 0.5).build())


def test_a_wrong_gradient_is_detected():
    wrong = peers.Peer(lambda a, w: scans.python_loop(a.detach() + 0 * a, w))
    with patch.dict(peers.PEERS, {"python loop": wrong}), pytest.raises(RuntimeError, match="another gradient"):
        peer_checks.check_peer("python loop", case("linear_recurrence").build())


def test_why_a_peer_is_left_out():
    def reason(given: inputs.Case, **limits) -> str | None:
        return peers.Peer(scans.python_loop, **limits).why_not(given, CPU)

    given = case("bmru", 0.0, time=5000)
    assert reason(given) is None
    assert reason(given, needs=("torch", "no_such_package")) == "no_such_package not installed"
    assert reason(given, epsilon=1.0) == "epsilon 1 only"
    assert reason(given, only_on="cuda") == "runs on cuda only"
    assert reason(given, most_steps=4096) == "up to 4096 steps only"
    assert reason(given, power_of_2=True) == "a power of 2 of steps only"
    assert reason(case("bmru", 0.0, time=64), power_of_2=True) is None
    assert reason(given, without=(torch.float32,)) == "does not take torch.float32"
    assert reason(given, decays="positive") is None
    assert reason(case("lif")) == "no affine form declared"
    assert reason(case("linear_recurrence"), decays="positive") == "positive decays only"
    positive = peers.Peer(scans.python_loop, decays="positive")
    assert positive.why_not(case("linear_recurrence"), CPU, own=True) is None
    assert reason(case("linear_recurrence"), decays="real") is None
    assert reason(case("linear_recurrence", dtype=torch.complex64), decays="real") == "real decays only"
