"""Write the tables of the pages from the committed records: `python -m docs.tables`.

A table is between the comments `<!-- COMMAND RECORD -->` and `<!-- end -->`. COMMAND prints it from RECORD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import records, report
from bench.gpu import report as gpu_report

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _speed(file: Path) -> str:
    record = report.load(file)
    return f"{records.facts_of(record['machine'])}\n\n{report.summary(record)}"


def _gpu(file: Path) -> str:
    return gpu_report.summary(json.loads(file.read_text()))


TABLES: dict[str, Callable[[Path], str]] = {"python -m bench report": _speed, "make gpu-check": _gpu}
_TABLE = re.compile(rf"<!-- ({'|'.join(TABLES)}) (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table made anew from its record."""

    def table(match: re.Match[str]) -> str:
        command, file, _ = match.groups()
        return f"<!-- {command} {file} -->\n{TABLES[command](ROOT / file)}\n<!-- end -->"

    return _TABLE.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
