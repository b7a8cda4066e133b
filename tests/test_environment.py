"""`python -m mru_kernels` reports the environment."""

import subprocess
import sys

import mru_kernels as mk


def test_environment_report():
    done = subprocess.run([sys.executable, "-m", "mru_kernels"], capture_output=True, text=True, check=True)
    assert f"mru_kernels        {mk.__version__}" in done.stdout
    assert "backend cpu      available" in done.stdout
