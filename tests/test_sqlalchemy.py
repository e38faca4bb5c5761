"""Both SQLAlchemy that applications use: the suite runs on 2.1, and the store on 2.0 as well."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: The tables, and the statements that a message meets on its way.
SUITES = ["test_store.py", "test_store_[as]*.py", "test_migrations.py"]


@pytest.mark.whole
@pytest.mark.timeout(400)
def test_the_store_works_on_sqlalchemy_2_0_too(tmp_path: Path) -> None:
    """An application on 2.0 installs Postroom beside it; its session becomes ours to use."""
    beside = tmp_path / "sqlalchemy"
    package = "sqlalchemy>=2.0.42,<2.1"
    # ./dev makes .venv with uv where it finds it, and then there is no pip in it.
    pip = [sys.executable, "-m", "pip", "install"]
    uv = ["uv", "pip", "install", "--python", sys.executable]
    install = [*(pip if find_spec("pip") else uv), "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", beside, package], check=True)
    files = sorted(path for pattern in SUITES for path in (ROOT / "tests").glob(pattern))
    version = "import sqlalchemy; print(sqlalchemy.__version__)"

    env = os.environ | {"PYTHONPATH": str(beside)}
    told = subprocess.run([sys.executable, "-c", version], env=env, capture_output=True, text=True,
                          check=True)  # fmt: skip
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], env=env, cwd=ROOT,
                         capture_output=True, text=True, check=False)  # fmt: skip

    assert told.stdout.startswith("2.0.")
    assert run.returncode == 0, run.stdout[-4000:]
