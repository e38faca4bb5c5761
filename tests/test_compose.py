"""docker-compose.yml and Dockerfile against the code: what they name exists, and is safe to run."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from worker.cli import app
from worker.config import Settings, duration

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"] == "postroom"}
SETTINGS = {f"POSTROOM_{name.upper()}" for name in Settings.model_fields} | {"POSTROOM_SECRETS_DIR"}
LONG_RUNNING = set(SERVICES) - {"migrate", "demo"}


def test_everything_that_the_issue_names_is_there() -> None:
    """Redis, PostgreSQL, the migration, two workers, beat, Flower, metrics; and the demo apart."""
    assert set(SERVICES) == {"redis", "postgres", "migrate", "worker", "beat", "flower", "metrics",
                             "demo"}  # fmt: skip
    assert SERVICES["worker"]["deploy"]["replicas"] == 2
    assert SERVICES["demo"]["profiles"] == ["demo"]
    assert all(one["profiles"] == ["service"] for n, one in SERVICES.items() if n != "demo")


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_setting_that_is_given_is_one(name: str) -> None:
    """A setting that was renamed would be without effect."""
    given = set(SERVICES[name].get("environment", {}))
    ours = {variable for variable in given if variable.startswith("POSTROOM_")}
    assert ours <= SETTINGS
    mentioned = set(re.findall(r"\$\{(POSTROOM_\w+)", yaml.safe_dump(SERVICES[name])))
    assert mentioned <= SETTINGS


def test_a_secret_that_postroom_reads_by_its_name_is_a_setting() -> None:
    """POSTROOM_SECRETS_DIR takes a file's name for a setting's."""
    named = {name.upper() for name in COMPOSE["secrets"] if name.startswith("postroom_")}
    assert named <= SETTINGS
    assert all(one["file"] == f"./secrets/{name}" for name, one in COMPOSE["secrets"].items())
    used = {secret for one in SERVICES.values() for secret in one.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])


@pytest.mark.parametrize("name", sorted(LONG_RUNNING))
def test_what_runs_for_long_is_looked_after(name: str) -> None:
    """It is started again, its health is asked for, its logs end, its stop has time."""
    one = SERVICES[name]
    assert one["restart"] == "unless-stopped"
    assert one["healthcheck"]["test"]
    assert one["stop_grace_period"]
    assert one["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_no_container_can_do_more_than_it_needs(name: str) -> None:
    """Nobody is root, no file system can be written, no capability is left, no secret in sight."""
    one = SERVICES[name]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert int(one["user"].split(":")[0]) > 0
    assert not re.search(
        r"password=|secret=|PASSWORD:(?!_FILE)", yaml.safe_dump(one), re.IGNORECASE
    )
    for port in one.get("ports", []):
        assert port.startswith("127.0.0.1:"), "published on the loopback only"


def test_a_worker_may_take_as_long_to_stop_as_its_requests_take() -> None:
    """Else docker kills it in mid-request, and leaves messages in doubt."""
    grace = duration(SERVICES["worker"]["stop_grace_period"])
    assert grace.total_seconds() > Settings().request_timeout.total_seconds() + 15


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_command_is_one(name: str) -> None:
    """Of postroom with options that it has, or one of the three processes of Celery."""
    command = SERVICES[name]["command"]
    probe = SERVICES[name].get("healthcheck", {}).get("test", ["CMD"])[1:]
    for words in (command, probe):
        if words[:1] == ["postroom"]:
            check_command(words[1:])
        elif words[:1] == ["celery"]:
            assert words[:3] == ["celery", "-A", "worker"]
            assert words[3] in {"worker", "beat", "flower"}
        else:
            assert words == [] or words[0] == "python3"


def test_redis_keeps_what_waits_and_forgets_nothing() -> None:
    """Append-only, no eviction, a limit; the password in no command line."""
    started = shlex.split(SERVICES["redis"]["command"][-1], comments=True)
    told = dict(pairwise(started))
    assert told["--appendonly"] == "yes"
    assert told["--maxmemory-policy"] == "noeviction"
    assert told["--maxmemory"] == "1gb"
    assert Settings().inbox_budget < 1e9 * 0.8
    assert "--requirepass" not in started


def test_the_image_runs_as_nobody_and_brings_no_tools_to_build_with() -> None:
    """Two stages: what builds stays behind; every package is pinned by its hash."""
    text = (ROOT / "Dockerfile").read_text()
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "pip" not in last
    assert "apt-get" not in last
    assert text.count("--require-hashes") == text.count("-r requirements/")
    names = set(re.findall(r"requirements/(\w+)\.txt", text))
    assert all((ROOT / "requirements" / f"{name}.txt").exists() for name in names)
    assert "hatchling" not in (ROOT / "requirements" / "image.txt").read_text()
    assert "# syntax" not in text, "the build asks no registry for a front end"
    variables = set(re.findall(r"POSTROOM_\w+", text))
    assert variables <= SETTINGS


def check_command(words: list[str]) -> None:
    """The command line takes these words. Nothing is run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))
