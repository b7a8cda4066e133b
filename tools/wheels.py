"""Build the wheel for release and check it on several versions of torch: `make wheels TORCH="2.11.0 2.13.0"`.

The sdist is built from the working tree, and the wheel from the sdist. The wheel has the CPU kernels and, if nvcc is
found, the CUDA kernels. It serves every torch from 2.11 on and every Python from 3.10 on. auditwheel gives it the
oldest manylinux tag that its symbols allow. Torch's libraries are left out, because the installed torch has them.

For each version of torch, a virtual environment in a temporary folder gets the wheel, and torch from pip's package
index. There the package prints what it found, and compares a sample of calls of every cell with the reference.

Two builds of a commit with the same compiler and torch give the same bytes. SOURCE_DATE_EPOCH, by default the time of
the commit, is the time stamp of all files in the wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
#: A sample of the comparison with the reference, for every cell and dtype.
CHECK = ("-m", "mru_kernels.bench", "compare", "--brief", "--part", "1/20")


def run(*command: str | Path, **options) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, **options)


def build() -> Path:
    """Build the sdist, and from it the wheel, both in dist. Returns the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", DIST, cwd=ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    if shutil.which("nvcc"):
        os.environ.setdefault("MRU_FORCE_CUDA", "1")  # even if the installed torch is a CPU build
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist)
        (wheel,) = Path(folder).glob("*.whl")
        exclude = [f"--exclude={library}" for library in TORCH_LIBRARIES]
        run(sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", DIST, wheel)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check(wheel: Path, torch: str) -> None:
    """Install the wheel with a version of torch, and run both checks."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin/python")
        run(python, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy")
        run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
        run(python, "-m", "mru_kernels", cwd=folder)
        run(python, *CHECK, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION", help="versions of torch to check on")
    versions = parser.parse_args().torch
    commit_time = ("git", "log", "-1", "--format=%ct")
    if "SOURCE_DATE_EPOCH" not in os.environ:
        os.environ["SOURCE_DATE_EPOCH"] = subprocess.check_output(commit_time, cwd=ROOT, text=True).strip()
    os.environ.pop("PYTHONPATH", None)  # the checks must import the installed package
    os.umask(0o022)  # a wheel contains the modes of its files
    wheel = build()
    for version in versions:
        check(wheel, version)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, checked on torch {', '.join(versions)}")
    print("sha256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    if "urls" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]:
        print("before an upload: [project.urls] of pyproject.toml has no address of the project")


if __name__ == "__main__":
    main()
