"""`python -m mru_kernels` prints versions, devices, backends, and why a backend is not available, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import __version__, available_backends
from .backends import cpu


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    capability = f"capability {properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {capability}, {memory}, {properties.multi_processor_count} multiprocessors"


def report() -> str:
    """Versions, devices and backends as text, one fact per line."""
    kernels = cpu.isa() if available_backends()["cpu"] is None else "none"
    facts = [
        ("mru_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} ({_torch_build()})"),
        ("GPU code in torch", " ".join(torch.cuda.get_arch_list()) or "none"),
        ("triton", _version_of("triton")),
        ("numpy", _version_of("numpy")),
        ("instruction set", f"{kernels} in mru_kernels, {torch.backends.cpu.get_cpu_capability()} in torch"),
    ]
    facts += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith("MRU_")]
    for device in _devices():
        facts.append((f"device {device}", _describe(device)))
        for name, reason in available_backends(device).items():
            facts.append((f"  backend {name}", "available" if reason is None else f"no: {reason}"))
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts)


if __name__ == "__main__":
    print(report())
