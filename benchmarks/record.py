"""Where results of benchmarks go: beside the command, machine and commit that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreserve.models.codec import write_text


def write_result(script: str, found: Mapping[str, Any]) -> None:
    """Write benchmarks/results/SCRIPT.json for benchmarks/SCRIPT.py."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0))
    document = {
        "command": f"python benchmarks/{script}.py",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {cores} cores, "
        f"Python {platform.python_version()}",
        **found,
    }
    Path("benchmarks/results").mkdir(exist_ok=True)
    text = json.dumps(document, indent=1, default=str) + "\n"
    write_text(f"benchmarks/results/{script}.json", text)
