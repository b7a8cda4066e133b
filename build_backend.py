"""The build backend: setuptools, with the torch of the environment that the package is installed into.

pip builds in an isolated environment and downloads the requirements of the build into it. For torch these are gigabytes
of CUDA libraries. But the build needs only headers and libraries of torch, and torch's stable ABI allows any torch from
2.11 on. So torch is not a requirement of the build. The build finds the installed torch, or says how to install it.
"""

import functools
import importlib.util
import re
import runpy
import sysconfig
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

INSTALL = "pip install 'setuptools>=77' ninja"


def missing(error: ModuleNotFoundError) -> SystemExit:
    """The error for a module that the build needs and that is not installed."""
    return SystemExit(f"mru_kernels: the build needs {error.name}, which is not installed: {INSTALL}")


try:
    import setuptools
    from setuptools import build_meta
    from setuptools.build_meta import *  # noqa: F403  (the hooks)
except ModuleNotFoundError as error:
    raise missing(error) from None

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"mru_kernels: the build needs setuptools 77 or newer, got {setuptools.__version__}: {INSTALL}")


class Torch(NamedTuple):
    """The facts of an installed torch, found without importing it."""

    folder: Path
    version: str
    cuda: str | None  # the CUDA version of the build; None for a CPU build


def find_torch() -> Torch:
    """The torch of this environment, even if build isolation hides it.

    Raises:
        SystemExit: there is none, or it is older than 2.11.
    """
    environment = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", environment)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "mru_kernels: the build needs torch 2.11 or newer, and this environment has none. Install torch first, for "
            "the CPU alone with\n    pip install torch --index-url https://download.pytorch.org/whl/cpu\n"
            "and then mru_kernels. Tools that build in an environment of their own, such as uv and `python -m build`, "
            "need --no-build-isolation or --no-isolation, and setuptools and ninja installed."
        )
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    if tuple(map(int, re.findall(r"\d+", facts["__version__"])[:2])) < (2, 11):
        raise SystemExit(f"mru_kernels: the build needs torch 2.11 or newer, got {facts['__version__']}")
    return Torch(folder, facts["__version__"], facts["cuda"])


def _after_torch(hook: Callable) -> Callable:
    """The hook, after a check for torch. So the error comes before pip downloads the requirements of the package."""

    @functools.wraps(hook)
    def call(*arguments, **options):
        find_torch()
        return hook(*arguments, **options)

    return call


get_requires_for_build_wheel = _after_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _after_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = _after_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _after_torch(build_meta.prepare_metadata_for_build_editable)
