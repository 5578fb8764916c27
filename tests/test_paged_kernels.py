"""The decoder's own kernels, as Triton's interpreter runs them on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")
pytest.importorskip("triton", reason="kernels of GPUs are written in Triton")


def test_kernels_compute_what_plain_arithmetic_does():
    """All of `kernel_checks`, in a process where Triton has never been anything but an
    interpreter: attention over ragged batches, windows, caps, heads of any width and
    group, contexts in parts, pages beyond 32 bits and full of what is not a number; norms,
    turning, gates; answers of two families token for token, by kernels that were all
    compiled before the first of them."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernel_checks.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout
