"""Makes cells.h, the list of cells, from the files of csrc/cells. Every build does so before it compiles.

setup.py and tests/simt run this file by its path: it is no part of the package.
"""

import runpy
from pathlib import Path


def names(csrc: Path) -> list[str]:
    """The cells: each file of `csrc`/cells is one, named as its ops."""
    return sorted(path.stem for path in (csrc / "cells").glob("*.h"))


def header(csrc: Path) -> str:
    """The text of cells.h: every cell's header, and MRU_EACH_CELL(X), which is X(name) for each."""
    cells = names(csrc)
    each = " ".join(f"X({cell})" for cell in cells)
    return "\n".join(
        ["#pragma once", *[f'#include "cells/{cell}.h"' for cell in cells], f"#define MRU_EACH_CELL(X) {each}", ""]
    )


def write_header(csrc: Path, folder: Path) -> None:
    """Write cells.h to `folder`."""
    write_if_changed(folder / "cells.h", header(csrc))


def write_schemas(csrc: Path, folder: Path) -> None:
    """Write schemas.h to `folder`: the schemas of the ops, as mru_kernels/ops and mru_kernels/softmax state them."""
    lines = ["#pragma once", "#include <utility>", "namespace mru {"]
    for table, package in (("kSchemas", "ops"), ("kSoftmaxSchemas", "softmax")):
        schemas = runpy.run_path(str(csrc.parent / f"mru_kernels/{package}/schemas.py"))["SCHEMAS"]
        rows = [f'    {{"{suffix}", "{schema}"}},' for suffix, schema in schemas.items()]
        lines += [f"inline constexpr std::pair<const char*, const char*> {table}[] = {{", *rows, "};"]
    write_if_changed(folder / "schemas.h", "\n".join([*lines, "}  // namespace mru", ""]))


def write_if_changed(path: Path, text: str) -> None:
    """Write `text` to `path`, unless it is there already, so that a build makes only what has changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
