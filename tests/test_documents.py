"""The examples of the documents run, and the files, tests and arguments that they name exist."""

from __future__ import annotations

import inspect
import re
import typing

import pytest
import torch

import mru_kernels as mk
from docs import tables
from mru_kernels import nn

PAGES = {str(path.relative_to(tables.ROOT)): path.read_text() for path in tables.PAGES}
PAGES["CONTRIBUTING.md"] = (tables.ROOT / "CONTRIBUTING.md").read_text()
#: A file or folder of the repository, and the name of a test in the file.
NAMED = re.compile(r"`((?:mru_kernels|csrc|python_ref|bench|tests|examples|docs)/[\w./-]*)(?:::(\w+))?`")
#: Its examples compile seven kernels.
SLOW = "docs/define.md"
EXAMPLES = [
    pytest.param(page, marks=[pytest.mark.check] * (page == SLOW))
    for page, text in PAGES.items()
    if "```python" in text
]


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        exec(block, names)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page):
    for file, test in NAMED.findall(PAGES[page]):
        path = tables.ROOT / file
        assert path.exists(), file
        assert not test or re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), f"{file}::{test}"


def _parameters(function) -> set[str]:
    return {
        name
        for name, p in inspect.signature(function).parameters.items()
        if name != "self" and not name.startswith("_") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def _constructor(cls: type) -> set[str]:
    bases = cls.__mro__[: cls.__mro__.index(torch.nn.Module)]
    return set().union(*(_parameters(vars(base)["__init__"]) for base in bases if "__init__" in vars(base)))


def _rows(heading: str) -> set[str]:
    """Names in the first column of the tables under a heading of docs/from-gru.md."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## )", PAGES["docs/from-gru.md"], re.DOTALL | re.MULTILINE)[1]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)[`{]", cell)}


def test_every_argument_has_a_row():
    """docs/from-gru.md has a row for every argument of `nn.GRU` and of the units."""
    gru, _ = typing.get_overloads(torch.nn.GRU.__init__)
    units = [getattr(mk, name) for name in mk.__all__ if inspect.isclass(getattr(mk, name))]
    units = [cls for cls in units if issubclass(cls, nn.MRUBase)]
    assert _rows("Constructor") == _parameters(gru).union(*map(_constructor, units))
    assert _rows("Call") == _parameters(torch.nn.GRU.forward) | {"output", "h_n"}


def test_the_parameters_have_rows():
    rows = {name.removesuffix("_l") for name in _rows("Parameters")}
    assert {name.removesuffix("_l0") for name, _ in mk.BMRU(2, 3).named_parameters()} <= rows
