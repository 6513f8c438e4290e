"""Python programs in a process of their own, and the peak memory of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB (Linux only).

    `ru_maxrss` would not do: Linux lets a child process begin with the peak of the process that started it, and a test
    run holds gigabytes.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run_python(program: str, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python code on one thread, with the package and the folder of the tests to import from."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)
