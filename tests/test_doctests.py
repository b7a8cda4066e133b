"""Every public function and class has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mru_kernels as mk
from mru_kernels import blocks, define, distributed, export, hardware, nn, schedule, snn, streaming, writes

MODULES = (mk, nn, blocks, define, schedule, streaming, distributed, export, hardware, snn, writes)

#: The package that an example needs.
NEEDS = {"nir": "nir", "from_snntorch": "snntorch"}

#: Modules for use within the package only.
INTERNAL = ("mru_kernels.backends", "mru_kernels.ops", "mru_kernels.softmax", "mru_kernels.torch_private")


def public() -> dict[str, Any]:
    """Every public function and class, by name."""
    named = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    return {name: value for name, value in named.items() if inspect.isclass(value) or inspect.isfunction(value)}


def docstrings() -> Iterator[tuple[str, str]]:
    """Names and docstrings of the modules, of public functions and classes, and of members of the classes."""
    values: dict[str, Any] = {module.__name__: module for module in MODULES} | public()
    for name, value in values.items():
        yield name, value.__doc__ or ""
        if inspect.isclass(value):
            # doctest's own search skips decorated methods.
            yield from ((f"{name}.{member}", inspect.getdoc(found) or "") for member, found in vars(value).items())


EXAMPLES = {name: text for name, text in docstrings() if ">>>" in text}


@pytest.mark.parametrize("name", public())
def test_has_an_example(name):
    assert "Example::" in (public()[name].__doc__ or "")
    assert name in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], {"torch": torch, "mk": mk}, name, None, None)
    torch.manual_seed(0)
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert results.attempted > 0
    assert not results.failed, "".join(report)


def test_an_example_that_is_wrong_fails():
    parser, report = doctest.DocTestParser(), []
    example = parser.get_doctest(">>> mk.BMRU(3, 8).epsilon\n1.0\n", {"mk": mk}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed == 1
    assert "Got:\n    0.0" in "".join(report)


def test_every_public_module_is_searched():
    own = [m for name, m in sys.modules.items() if name.startswith("mru_kernels.") and not name.startswith(INTERNAL)]
    assert {module for module in own if hasattr(module, "__all__")} <= set(MODULES)
