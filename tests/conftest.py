"""Options for the backend and device of the tests, and the hypothesis profiles."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# pytest rewrites asserts in these tool modules, so that a failure shows the values that differ.
pytest.register_assert_rewrite(*(f"tests.{name}" for name in ("by_hand", "calls", "drawn", "traced_gradients")))

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("brief", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("few", max_examples=6, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=300, **_COMMON)
settings.load_profile("suite")

# Largest (time, channels) to test each backend with. Interpreted backends are slow.
_LARGEST = {"cpu": (300, 80)}
_LARGEST_INTERPRETED = (150, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="backend to test; may be repeated (default: cpu)")
    parser.addoption("--device", default="cpu", help="device that the tensors are on")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("XDG_CACHE_HOME", str(config.rootpath / "build" / "cache"))  # of the cells that tests define
    if "triton" in _names(config) and config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first import of triton
    if "simt" in _names(config):
        import simt

        simt.register()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _names(metafunc.config), scope="session")


def _names(config: pytest.Config) -> list[str]:
    return config.getoption("backend") or ["cpu"]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture
def one_thread():
    from bench import verify  # not before TRITON_INTERPRET is set

    with verify.threads(1):
        yield


@pytest.fixture
def group_of_one():
    """A process group that contains this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # see tests/processes.py
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def largest(backend: str, device: torch.device) -> tuple[int, int]:
    """The largest time and number of channels to test `backend` with."""
    return _LARGEST["cpu"] if device.type != "cpu" else _LARGEST.get(backend, _LARGEST_INTERPRETED)
