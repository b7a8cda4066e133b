"""Mutation testing of the Python package: `make mutate MODULES=mru_kernels/checks.py TESTS=tests/test_bad_input.py`.

cosmic-ray changes one operator, comparison, number or keyword in a copy of the repository and runs the tests. A mutant
that survives shows a fault that no test detects, or a change without effect, so read each survivor. All mutants of the
package take days, so a run draws a sample. Files that Triton compiles are excluded; planted faults test these.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutation"
COPIED = ("mru_kernels", "python_ref", "bench", "tests", "examples", "csrc", "docs", "README.md", "pyproject.toml")
_NAMES = (
    *("op", "op_layout", "torch", "torch_func", "torch_modes", "bad_input", "bad_ops"),
    *("nn", "epsilon", "unit_meta", "unit_bad_input", "unit_tools", "network"),
)
TESTS = " ".join(f"tests/test_{name}.py" for name in _NAMES)
#: Operator of mutants in unions of types, which are never evaluated.
WITHOUT_EFFECT = "core/ReplaceBinaryOperator_BitOr_"

CONFIG = """
[cosmic-ray]
module-path = [{modules}]
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider -m 'not slow and not check' {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def draw(session: WorkDB, count: int, seed: int) -> None:
    """Skip all mutants except `count`, drawn at random."""
    candidates = [
        item.job_id
        for item in session.work_items
        if not any(m.operator_name.startswith(WITHOUT_EFFECT) for m in item.mutations)
    ]
    kept = set(random.Random(seed).sample(sorted(candidates), min(count, len(candidates))))
    for item in list(session.work_items):
        if item.job_id not in kept:
            session.set_result(item.job_id, WorkResult(output="not drawn", worker_outcome=WorkerOutcome.SKIPPED))


def report(session: WorkDB) -> bool:
    """Print the survivors as diffs, and the number of mutants. Return whether none survived."""
    outcomes: Counter[str] = Counter()
    for job_id, result in session.results:
        if result.worker_outcome == WorkerOutcome.SKIPPED:
            continue
        survived = result.worker_outcome == WorkerOutcome.NORMAL and result.test_outcome == TestOutcome.SURVIVED
        outcomes["survived" if survived else "killed"] += 1
        if survived:
            print(f"{job_id}\n{result.diff}\n")
    print(f"{outcomes.total()} mutants, {outcomes['survived']} survived")
    return outcomes["survived"] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="default: all of mru_kernels that Triton does not compile")
    parser.add_argument("--tests", default=TESTS, help="what pytest is given")
    parser.add_argument("--count", type=int, default=50, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutant")
    arguments = parser.parse_args()
    every = (path for path in (ROOT / "mru_kernels").rglob("*.py") if not path.name.startswith("triton_"))
    modules = arguments.modules or sorted(str(path.relative_to(ROOT)) for path in every)

    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, COPY / name)
    listed = ", ".join(f'"{module}"' for module in modules)
    text = CONFIG.format(modules=listed, timeout=arguments.timeout, python=sys.executable, tests=arguments.tests)
    (COPY / "mutation.toml").write_text(text)

    def cosmic_ray(*command: str) -> None:
        subprocess.run([Path(sys.executable).parent / "cosmic-ray", *command], check=True, cwd=COPY)

    cosmic_ray("baseline", "mutation.toml")
    cosmic_ray("init", "mutation.toml", "mutation.sqlite")
    database = str(COPY / "mutation.sqlite")
    with use_db(database) as session:
        draw(session, arguments.count, arguments.seed)
    cosmic_ray("exec", "mutation.toml", "mutation.sqlite")
    with use_db(database) as session:
        return 0 if report(session) else 1


if __name__ == "__main__":
    sys.exit(main())
