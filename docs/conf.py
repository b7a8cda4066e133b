"""Configuration of Sphinx: `make docs` writes the site to build/docs."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import mru_kernels

HERE = Path(__file__).parent


def torch_inventory() -> str:
    """Write an intersphinx inventory of the names in torch_names.txt, so that a build needs no network."""
    header = "# Sphinx inventory version 2\n# Project: torch\n# Version:\n# The rest is compressed with zlib.\n"
    lines = [line.split() for line in (HERE / "torch_names.txt").read_text().splitlines()]
    entries = "".join(f"{name} py:{kind} 1 {address} -\n" for name, kind, address in lines)
    file = HERE.parent / "build" / "torch.inv"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(header.encode() + zlib.compress(entries.encode()))
    return str(file)


project = "mru_kernels"
version = release = mru_kernels.__version__
copyright = "the authors of mru_kernels"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
]
html_theme = "furo"
html_title = f"mru_kernels {version}"

myst_heading_anchors = 3

default_role = "code"  # a docstring's single backquotes
autodoc_member_order = "groupwise"
autodoc_default_options = {"exclude-members": "gates, vectors, initial_states, dtypes, extra_repr"}
napoleon_custom_sections = ["Call", "A schedule of epsilon", "Several processes"]
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", torch_inventory())}
nitpick_ignore_regex = [
    ("py:.*", r"mru_kernels\..*"),  # private bases and aliases, which have no entry
    ("py:.*", r"(pathlib\.)?Path|os\.PathLike|NIRGraph"),
    ("py:.*", r"collections\.abc\..*"),
    ("py:.*", r"torch\.distributed\.distributed_c10d\..*"),
]


def as_rst(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """Turn a docstring into reStructuredText, in place.

    Docstrings are written for an editor: arguments under `Call:`, tables in columns, `|x|` and `Name`s in plain text.
    """
    result = []
    in_call, literal = False, None  # literal: the indentation of the paragraph that a literal block follows
    for i, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if re.search(r"[^:]:$", line) and re.match(r" *;( {4})+\S+( \S+)* {2,}\S", ";".join(lines[i + 1 : i + 3])):
            line += ":"  # a table in columns
        if line and literal is not None and indentation <= literal:
            literal = None
        if literal is None:
            line = re.sub(r"`[^`]*`|\|", lambda match: r"\|" if match[0] == "|" else match[0], line)
            line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)
            if line and indentation == 0:
                in_call = line == "Call:"
            if line.endswith("::"):
                literal = indentation
        argument = re.fullmatch(r"    (\w[\w, ]*): (.+)", line) if in_call else None
        result += [f"    {argument[1]}", f"        {argument[2]}"] if argument else [line]
    lines[:] = result


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
