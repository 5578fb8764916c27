"""The structure is checked, not remembered: layers, foreign libraries, packaging."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "traces", "solvers", "planner", "runtime")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layers_and_foreign_imports():
    """import-linter: siblings do not meet, solver libraries stay in their files."""
    lint = Path(sys.executable).with_name("lint-imports")
    assert "0 broken" in run(lint)


def test_types():
    """mypy --strict over the whole package."""
    pytest.importorskip("mypy")
    assert "Success" in run(sys.executable, "-m", "mypy", "-p", "foreserve")


def test_style():
    """ruff: lint (which carries the bans on clocks and global chance) and format."""
    ruff = Path(sys.executable).with_name("ruff")
    run(ruff, "check", ".")
    run(ruff, "format", "--check", ".")


def test_help_loads_no_heavy_library():
    """`plan --help` answers without solvers, pandas, pydantic or matplotlib."""
    heavy = "pyomo ortools highspy pandas pydantic matplotlib rich ray torch"
    code = (
        "import sys, foreserve.cli\n"
        "try: foreserve.cli.cli(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy.split()!r} if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code).strip().endswith("[]")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """sdist -> wheel, as a package index would build it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    (built,) = out.glob("*.whl")
    return sdist, built


@pytest.mark.slow
def test_wheel_has_every_module_and_nothing_generic(wheel, tmp_path):
    """sdist and wheel carry all modules and data; a clean environment imports them as
    foreserve.*, and no `models`, `runtime`, ... of ours is importable."""
    sdist, built = wheel
    sources = {
        f"foreserve/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder in FOLDERS
        for pattern in ("*.py", "*.toml", "*.yaml", "*.csv.gz", "*.j2", "*.css")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert len(sources) > 50
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    assert sources <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "foreserve"
    }
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in sources} <= packed
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", built)
    code = (
        "import importlib.util as u, pathlib, foreserve\n"
        f"assert not any(u.find_spec(n) for n in {FOLDERS!r})\n"
        "print(*pathlib.Path(foreserve.__path__[0]).parent.glob('foreserve/**/*.py'))"
    )
    installed = run(python, "-c", code, cwd=tmp_path, PYTHONPATH="").split()
    found = {path[path.rindex("foreserve/") :] for path in installed}
    assert {name for name in sources if name.endswith(".py")} <= found
