"""Both SQLAlchemy that applications use: the suite runs on 2.1, and the store on 2.0 as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Every statement that a message meets on its way; not what takes long by waiting.
SUITES = ["test_store.py", "test_store_[abcds]*.py", "test_migrations.py"]


@pytest.mark.whole
@pytest.mark.timeout(400)
def test_the_store_works_on_sqlalchemy_2_0_too(tmp_path: Path) -> None:
    """An application on 2.0 installs Postroom beside it; its session becomes ours to use."""
    beside = tmp_path / "sqlalchemy"
    package = "sqlalchemy>=2.0.42,<2.1"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, beside, package], check=True)
    files = sorted(path for pattern in SUITES for path in (ROOT / "tests").glob(pattern))
    version = "import sqlalchemy; print(sqlalchemy.__version__)"

    env = os.environ | {"PYTHONPATH": str(beside)}
    told = subprocess.run([sys.executable, "-c", version], env=env, capture_output=True, text=True,
                          check=True)  # fmt: skip
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], env=env, cwd=ROOT,
                         capture_output=True, text=True, check=False)  # fmt: skip

    assert told.stdout.startswith("2.0.")
    assert run.returncode == 0, run.stdout[-4000:]
