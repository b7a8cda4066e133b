"""What SECURITY.md promises: what the import executes, and that everything saved loads without executing code."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mru_kernels as mk
from mru_kernels.torch_private import has_kernel
from tests import units

ROOT = Path(__file__).parents[1]

# Every audit event of the import, after that of torch. A write of bytecode is Python's own: -B turns it off.
EVENTS = """
import json, os, sys, torch
events = []
def hook(name, arguments):
    if name == "open" and isinstance(arguments[2], int):
        name += " to write" if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else " to read"
    events.append((name, str(arguments[0]) if arguments else ""))
sys.addaudithook(hook)
import mru_kernels
print(json.dumps(events[:]))
"""


@pytest.fixture(scope="module")
def events() -> list[tuple[str, str]]:
    command = [sys.executable, "-B", "-c", EVENTS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    return [tuple(event) for event in json.loads(done.stdout)]


def test_the_import_opens_no_socket_starts_no_process_and_writes_no_file(events):
    forbidden = r"(socket|urllib|http|ftplib|smtplib|subprocess|pty|shutil|tempfile|winreg|webbrowser)\."
    forbidden += (
        r"|os\.(system|exec|fork|forkpty|posix_spawn|spawn|kill|remove|rename|mkdir|chmod|putenv)|open to write"
    )
    assert [event for event in events if re.match(forbidden, event[0])] == []
    assert "open to read" in dict(events)


def test_the_import_loads_the_extension_and_no_other_library(events):
    loaded = [Path(argument) for name, argument in events if name == "ctypes.dlopen"]
    assert [path.parent for path in loaded] == [Path(mk.__file__).parent]
    assert re.fullmatch(r"_C\..*so", loaded[0].name)


def test_the_extension_calls_no_function_for_the_network_or_for_processes():
    if has_kernel("mru::bmru.cuda", "CUDA"):
        pytest.skip("the runtime of CUDA, which this build contains, has such functions")
    (extension,) = Path(mk.__file__).parent.glob("_C*.so")
    table = subprocess.run(["nm", "-D", "--undefined-only", extension], check=True, capture_output=True, text=True)
    names = {line.split()[-1].partition("@")[0] for line in table.stdout.splitlines()}
    assert "getenv" in names
    forbidden = (
        r"socket|connect|bind|listen|fork|vfork|clone|exec\w+|system|popen|posix_spawnp?|dlopen|f?open(64)?|mmap"
    )
    assert [name for name in names if re.fullmatch(forbidden, name)] == []


def test_the_environment_variables_that_are_read():
    """The table of SECURITY.md has them, and no other."""
    read = r"""(?:environ\.get\(|environ\[|getenv\()["'](\w+)["']"""
    files = [*ROOT.glob("mru_kernels/**/*.py"), *ROOT.glob("csrc/**/*.[ch]*"), ROOT / "setup.py"]
    names = {name for file in files for name in re.findall(read, file.read_text())}
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert set(rows) == names
    assert len(rows) == len(names)


def _modules() -> list[torch.nn.Module]:
    network = units.network()
    cache = mk.MemoryCache(mk.BMRU(4, 6), segment=2)
    return [
        *(units.unit(cls) for cls in units.UNITS),
        network,
        network.blocks[0],
        cache,
        mk.DelayConv(4, 5),
        mk.MesaNet(4, 6),
        mk.PRF(4, 6),
        mk.RWKV4TimeMix(4),
        mk.RWKV4ChannelMix(4),
        mk.RWKV4(9, 4, 2),
    ]


def test_every_public_module_is_saved_here():
    public = {getattr(mk, name) for name in mk.__all__ if name not in ("distributed", "export")}
    modules = {value for value in public if inspect.isclass(value) and issubclass(value, torch.nn.Module)}
    assert {type(module) for module in _modules()} == modules


@pytest.mark.parametrize("module", _modules(), ids=lambda module: type(module).__name__)
def test_states_load_without_executing_code(module, tmp_path):
    """The state of a module, and of a stream that it reads."""
    feed = mk.stream(module)
    feed(torch.randint(9, (2, 5)) if isinstance(module, mk.RWKV4) else torch.randn(2, 5, 4))
    _save_and_load({"module": module.state_dict(), "stream": feed.state}, tmp_path / "saved")


def test_traces_load_without_executing_code(tmp_path):
    feed = mk.stream(units.network(), gradient="traces")
    feed(torch.randn(2, 5, 4))
    _save_and_load(feed.traces, tmp_path / "saved")


def test_a_schedule_loads_without_executing_code(tmp_path):
    _save_and_load(mk.EpsilonSchedule(units.network(), decay_steps=10).state_dict(), tmp_path / "saved")


def _save_and_load(saved, path: Path) -> None:
    """`weights_only=True` reads tensors and plain containers, and refuses a class of ours."""
    torch.save(saved, path)
    torch.testing.assert_close(torch.load(path, weights_only=True), saved, rtol=0, atol=0)
