"""Faults planted into a copy of the Triton kernels, one at a time: a check must catch each. Run by test_triton.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mru_kernels.backends import triton as backend
from mru_kernels.backends.triton import ops as backend_ops
from tests import triton_checks as checks


def plant(monkeypatch, folder: Path, old: str, new: str) -> None:
    """Let calls take a copy of the backend in whose source the text `old`, which occurs once, is `new`."""
    source, copy = Path(backend.__path__[0]), folder / "triton"
    found = [path.relative_to(source) for path in source.rglob("*.py") for _ in range(path.read_text().count(old))]
    assert len(found) == 1, f"expected the text once, got it in {found}: {old}"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / found[0]).write_text((copy / found[0]).read_text().replace(old, new))
    for name, module in list(vars(backend).items()):
        if isinstance(module, ModuleType) and module.__name__.startswith(f"{backend.__name__}."):
            monkeypatch.delattr(backend, name)
    for name in list(sys.modules):
        if name.startswith(f"{backend.__name__}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(backend, "__path__", [str(copy)])
    monkeypatch.setattr(backend_ops, "Call", checks.module_of("launch").Call)


_RAISE = "tl.store(scan.flag, 1)"
_ENDS = "        if at.begin < at.end:\n            flip = size(walk.flip)\n"
FAULTS = {
    "check that never fires": (checks.cuts_overflow, _RAISE, _RAISE.replace("1", "0")),
    "check that skips the last boundary": (
        checks.the_only_segment_overflows,
        _ENDS,
        _ENDS.replace("at.begin < at.end", "at.end < at.length"),
    ),
    "check that skips the first boundary": (
        checks.the_first_segment_overflows,
        _ENDS,
        _ENDS.replace("at.begin < at.end", "(at.begin > 0) & (at.begin < at.end)"),
    ),
    "sums of another chunk": (
        checks.sums_of_segments,
        "summed = sums_row(c.scan, at, c.form) + chunk // c.form.chunk",
        "summed = sums_row(c.scan, at, c.form) + (chunk - at.begin) // c.form.chunk",
    ),
    "sums of the cut kept": (
        checks.sums_are_replaced,
        "put(grads[k].data, row, c.at, sums[k], c.at.mask)",
        "put(grads[k].data, row, c.at, sums[k], when(c.scan.rescan == 0, c.at.mask))",
    ),
    "rounding measured by what entered": (
        checks.a_factor_of_few_bits_grows,
        "* terms + ROUNDING * late",
        "* terms + ROUNDING * rules.magnitude(entry)",
    ),
    "factors that underflow taken as rounding": (
        checks.infinite_state,
        'near = (error <= bound) & (bound < float("inf"))',
        "near = error == error",
    ),
    "row of codes by index": (
        checks.codes_of_packed_sequences,
        "at.start // WORD + at.n, at.n *",
        "at.start // WORD + at.index, at.n *",
    ),
    "row of codes shared": (
        checks.codes_of_packed_sequences,
        "at.start // WORD + at.n, at.n *",
        "at.start // WORD, at.n *",
    ),
    "empty sequence entered": (checks.empty_sequences_keep_their_state, " & (c.at.length > 0)", ""),
    "sequence not entered": (checks.empty_sequences_keep_their_state, "    s = enter(c, opened, s)\n", ""),
    "sequence not entered in its map": (
        checks.empty_sequences_keep_their_state,
        "(factor, enter(c, opened, offset))",
        "(factor, offset)",
    ),
    "maps in the wrong order": (
        checks.maps_of_groups,
        "apply(rules, second, first[1])",
        "apply(rules, first, second[1])",
    ),
    "map of another sequence": (
        checks.maps_of_packed_sequences,
        "row = tl.where(scan.packed != 0, index, item)",
        "row = item",
    ),
    "offsets that fall": (
        checks.spans_lie_within_time,
        "tl.load(scan.offsets + index + 1), low)",
        "tl.load(scan.offsets + index + 1), 0)",
    ),
    "offsets below 0": (
        checks.spans_lie_within_time,
        "tl.maximum(tl.load(scan.offsets + index), 0)",
        "tl.load(scan.offsets + index)",
    ),
    "offsets beyond the end": (
        checks.spans_lie_within_time,
        "tl.load(scan.offsets + index + 1), low), scan.time)",
        "tl.load(scan.offsets + index + 1), low), 2 * scan.time)",
    ),
    "reset that keeps the state": (
        checks.resets_of_streams,
        "            before = where_reset(c, resets, i, reset_state, s)",
        "            before = s",
    ),
    "reset that keeps the recomputed state": (
        checks.resets_of_streams,
        "        s = where_reset(c, resets, i, reset_state, within[i])",
        "        s = within[i]",
    ),
    "reset that m passes": (checks.resets_of_streams, "        m = where_reset(c, resets, i, 0.0, m)\n", ""),
    "reset that m passes in a summary": (
        checks.resets_and_writes_that_reset,
        "before = where_reset(c, resets, j + i, 0.0, before)",
        "before = before",
    ),
    "checkpoint saved after the reset": (
        checks.resets_of_streams,
        "        if (scan.saved != 0) & (after % c.form.chunk == 0) & (after < at.length):\n",
        "        s = where_reset(c, bits_of(c, mask), 0, reset_state, s)\n"
        "        if (scan.saved != 0) & (after % c.form.chunk == 0) & (after < at.length):\n",
    ),
    "gradient of a boundary lost at the end of a segment": (
        checks.resets_of_streams,
        "(step < c.at.length)",
        "(step < c.at.end)",
    ),
    "mask of another time": (
        checks.resets_of_codes,
        "tl.where(c.scan.reverse != 0, c.scan.time - 1 - position, position)",
        "position",
    ),
    "sums of resets that lose a chunk": (
        checks.sums_over_many_resets,
        "count = ceil_div(self.time, chunk)",
        "count = self.time // chunk",
    ),
    "head that keeps NaN": (
        checks.resets_drop_nan,
        "tl.where(map_[0] == map_[0], rules.times(map_[0], s) + map_[1], map_[1])",
        "rules.times(tl.where(map_[0] == map_[0], map_[0], 0.0), s) + map_[1]",
    ),
    "programs of one axis": (
        checks.programs_beyond_one_axis,
        "unit = tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)",
        "unit = tl.program_id(0).to(tl.int64)",
    ),
}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_faultless(check):
    check()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(monkeypatch, tmp_path, name):
    check, old, new = FAULTS[name]
    plant(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(("dtype", "reverse"), [(torch.complex64, False), (torch.float64, True)])
def test_cuts_overflow_in_other_dtypes(dtype, reverse):
    checks.late_update(150, 150, dtype, reverse)
