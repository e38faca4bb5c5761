"""Every command that a document shows is run, or at least is one; every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery.bin.celery import celery

from tests.support import clean_environment
from tests.test_compose import SETTINGS, check_command
from tests.test_spine import Service, service, simulator_options
from worker.config import Settings
from worker.model import Message
from worker.report import BEAT

__all__ = ["service", "simulator_options"]

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SENDER, OUTSIDE = "notices@contoso.com", "director@contoso.com"
#: These serve until they are stopped: only their words are checked.
SERVERS = ("postroom metrics", "postroom simulator", "postroom smtp", "postroom batch watch")

#: Ours, and no settings: of demo and tests, and those of Django's that its backend reads.
OTHERS = {"POSTROOM_REDIS_SERVER", "POSTROOM_SENDER", "POSTROOM_POOL"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(document: Path, language: str) -> list[str]:
    return [text for found, text in _FENCE.findall(document.read_text()) if found == language]


def commands(document: Path) -> list[str]:
    """The commands of the blocks marked `sh`, continued lines joined, comments dropped."""
    text = "".join(blocks(document, "sh")).replace("\\\n", " ")
    return [line for raw in text.splitlines() if (line := re.sub(r"\s{2,}#.*", "", raw).strip())]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_works(
    document: Path, service: Service, tmp_path: Path, redis_client: redis.Redis
) -> None:
    """In the order of the document, against real parts, with a worker at work."""
    shown = commands(document)
    if not any(line.startswith("postroom") for line in shown):
        pytest.skip("it shows no command of ours")
    service.simulator.settings(out_of_scope=[OUTSIDE])
    service.worker("one")
    redis_client.set(BEAT, "1", ex=300)
    service.simulator.fault("status", 1, status=400, code="ErrorInvalidRecipients")
    batch = service.client.enqueue(
        [Message(f"{name}@example.org", "News", text="Hello") for name in ("ann", "bob")],
        sender=SENDER,
    ).batch_id
    service.wait_for_end(batch)
    message = next(iter(service.client.messages(batch)))["id"]
    names = {"ID": batch, "MESSAGE": message, "M": SENDER}
    cwd = tmp_path / "shell"
    cwd.mkdir()
    for name, content in {"hello.txt": "Hello", "invoice.html": "<p>Hello {{ name }}</p>",
                          "invoices.csv": "to,name\nann@example.org,Ann\n"}.items():  # fmt: skip
        (cwd / name).write_text(content)
    for line in shown:
        checked(line, names, service, cwd)


def checked(line: str, names: dict[str, str], service: Service, cwd: Path) -> None:
    """Runs the line, or checks its words where it would not end or not concern this machine."""
    words = shlex.split(line)
    match words[0]:
        case "./dev" | "pip":
            assert line == "pip install ." or f"./dev {words[1]}" in (ROOT / "dev").read_text()
        case "export":
            assert {word.partition("=")[0] for word in words[1:]} <= SETTINGS
        case "celery":
            check_celery(words[1:])
        case "postroom" if line.startswith(SERVERS):
            check_command(words[1:])
        case _:
            run(re.sub(r"\b(ID|MESSAGE|M)\b", lambda m: names[m[1]], line), service, cwd)


def run(line: str, service: Service, cwd: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = clean_environment() | service.environment | {"PATH": path}
    done = subprocess.run(["sh", "-ec", line], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def check_celery(words: list[str]) -> None:
    """Celery, and Flower under it, take these words. Nothing is run."""
    assert words[:2] == ["-A", "worker"]
    command: Any = celery.commands.get(words[2])
    if command is None:
        assert words[2] == "flower"
        return
    command.make_context(words[2], words[3:], parent=None, resilient_parsing=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_settings_of_a_document_exist(document: Path) -> None:
    """A file beside it, a heading in it, a variable that is a setting."""
    text = document.read_text()
    for link in _LINK.findall(text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = (document.parent / path) if path else document
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert set(re.findall(r"POSTROOM_[A-Z_]+[A-Z]", text)) <= SETTINGS | OTHERS


def test_each_step_of_the_set_up_names_checks_that_the_doctor_makes() -> None:
    """A line that the doctor does not say proves nothing."""
    text = (ROOT / "docs" / "entra-setup.md").read_text()
    parts = re.findall(r"Doctor[^.]*?: ([^.]*)\.", text)
    said = {name for part in parts for name in re.findall(r"`([a-z -]+)`", part)}
    doctor = "".join(path.read_text() for path in (ROOT / "worker" / "doctor").glob("*.py"))
    assert len(said) > 10
    assert {name for name in said if f'"{name}"' not in doctor} == set()


def test_every_setting_of_the_set_up_has_its_step() -> None:
    """Each step ends with the setting that it fills."""
    text = (ROOT / "docs" / "entra-setup.md").read_text()
    for name in ("TENANT_ID", "CLIENT_ID", "CLIENT_SECRET_FILE", "CLIENT_CERTIFICATE_FILE",
                 "AUTHORITY", "GRAPH_URL"):  # fmt: skip
        assert f"POSTROOM_{name}" in text


def test_the_manifests_for_kubernetes_fit_the_code() -> None:
    """Commands, settings and probes exist; the grace period is longer than a request."""
    [text] = blocks(ROOT / "docs" / "scaling.md", "yaml")
    manifests = list(yaml.safe_load_all(text))
    config = next(one for one in manifests if one["kind"] == "ConfigMap")
    assert set(config["data"]) <= SETTINGS
    for deployment in (one for one in manifests if one["kind"] == "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            probes = [container[name]["exec"]["command"] for name in container if "Probe" in name]
            for words in [container["args"], *probes]:
                if words[0] == "postroom":
                    check_command(words[1:])
                else:
                    check_celery(words[1:])
    worker = manifests[0]["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] > Settings().request_timeout.total_seconds() + 15
