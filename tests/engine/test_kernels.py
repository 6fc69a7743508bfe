"""The Triton kernels compute what their references do: interpreted on a CPU, and as they are on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "kernel_checks.py"


def checks():
    spec = importlib.util.spec_from_file_location("kernel_checks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHECKS


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ok ")] == list(checks())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", checks())
def test_kernels_on_a_gpu(name, kind):
    checks()[name]("cuda", kind)
