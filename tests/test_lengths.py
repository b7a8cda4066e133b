"""Source files have at most 400 lines, and functions at most 60, without their docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mru_kernels", "csrc", "python_ref", "bench", "examples", "tests", "tools", "docs")
PYTHON, CPP = (".py",), (".h", ".cuh", ".cu", ".cpp")


def files(suffixes: tuple[str, ...]) -> list[Path]:
    found = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return [path for path in found if path.suffix in suffixes]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each Python function, without its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            has_docstring = ast.get_docstring(node, clean=False) is not None
            docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def cpp_functions(source: str) -> Iterator[tuple[str, int]]:
    """First line and number of lines of each C++ function.

    clang-format lets a function end with the first `}` at the indentation of its first line. All lines between are
    deeper, except blank lines and directives.
    """
    lines = source.split("\n")
    for last, line in enumerate(lines):
        if not re.fullmatch(r" {0,4}\}", line):
            continue
        first = last - 1
        while not re.match(line[:-1] + r"[^ #]", lines[first]):
            first -= 1
        if "(" in lines[first] and not re.match(
            r" *(struct|class|namespace|enum|for|if|while|switch|else|\})", lines[first]
        ):
            yield lines[first].strip(), last - first + 1


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files(PYTHON + CPP)}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize(("suffixes", "functions_of", "least"), [(PYTHON, functions, 2000), (CPP, cpp_functions, 500)])
def test_functions_are_short(suffixes, functions_of, least):
    found = [(path.name, *f) for path in files(suffixes) for f in functions_of(path.read_text())]
    assert len(found) > least  # so the functions are found
    assert [(file, name, lines) for file, name, lines in found if lines > 60] == []
