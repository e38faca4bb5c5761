"""Every command that a document shows is run, or at least is one; every link leads somewhere.

Blocks marked `sh` are run. What stands between backticks, in Docker's blocks and in the alerts is
held against the command line's own parser, for it has gaps where a reader fills in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
import yaml
from celery.bin.celery import celery

from tests.benchmarks.__main__ import BENCHES
from tests.store_kit import opened, postgresql_only
from tests.support import clean_environment
from tests.test_compose import SERVICES, SETTINGS, check_command
from tests.test_spine import Service, service, simulator_options
from worker import Attachment
from worker.cli import app
from worker.config import Settings
from worker.model import Message
from worker.report import BEAT
from worker.simulator import settings as simulator_settings

__all__ = ["service", "simulator_options"]

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALERTS = ROOT / "docs" / "alerts.yml"
SENDER, OUTSIDE = "notices@contoso.com", "director@contoso.com"
#: These serve until they are stopped: only their words are checked.
SERVERS = ("postroom metrics", "postroom smtp", "postroom batch watch")

#: How each kind of block is looked after; those of other people's tools cannot be run here.
BLOCKS = {
    "sh": "run, in the order of the document",
    "python": "run",
    "sql": "run on PostgreSQL: security.md's in test_retention.py, scaling.md's here",
    "yaml": "held against the code",
    "env": "held against settings and docker-compose.yml",
    "docker": "held against docker-compose.yml and the command line; no engine is needed",
    "console": "the same call is made in test_flower.py",
    "azurecli": "it would change a tenant of Microsoft's; its shell syntax is checked",
    "powershell": "it would change a tenant of Microsoft's, and there is no PowerShell here",
    "": "what a command prints, and drawings; it holds no command",
}

#: Ours, and no settings: of demo and tests, and those of Django's that its backend reads.
OTHERS = {"POSTROOM_REDIS_SERVER", "POSTROOM_SENDER", "POSTROOM_POOL"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`(?:[A-Z_]+=\S+ )*((?:postroom|celery|docker|\./dev) [^`]+)`")


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
    for block in blocks(document, "python"):
        run(f"python -c {shlex.quote(block)}", service, cwd)
    for line in shown:
        checked(line, names, service, cwd)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_of_a_document_is_looked_after(document: Path) -> None:
    """A kind of block that nobody checks would be the place where a wrong command hides."""
    found = _FENCE.findall(document.read_text())
    assert {language for language, _ in found} <= set(BLOCKS)
    for language, text in found:
        if language == "":
            assert not re.search(r"^(\$|postroom|celery|docker|\./dev) ", text, re.MULTILINE)
        if language == "azurecli":
            subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("document", [*DOCUMENTS, ALERTS], ids=lambda path: path.name)
def test_every_command_in_a_sentence_is_one(document: Path) -> None:
    """Commands exist, with these options; what a reader has to fill in is not looked at."""
    text = document.read_text()
    if document == ALERTS:
        shown = re.findall(r"\b(postroom [a-z][^;,?\"]*)", text)
    else:
        shown = _INLINE.findall(_FENCE.sub("", text))
    shown += [line for block in blocks(document, "docker") for line in block.splitlines()]
    for line in shown:
        check_words(line.replace("...", "").split())


def check_words(words: list[str]) -> None:
    """Words of one of the tools that documents name; `a|b` stands for either."""
    match words:
        case ["postroom", *rest]:
            check_options(rest)
        case ["celery", *rest]:
            check_celery(rest)
        case ["./dev", "bench", name]:
            assert name in BENCHES
        case ["./dev", name, *_]:
            assert f"\n{name})" in (ROOT / "dev").read_text() or name in {"bench", "chaos"}
        case ["docker", "compose", *rest]:
            check_compose(rest)
        case _:
            pytest.fail(f"nobody knows {words}")


def check_options(words: list[str]) -> None:
    """The command exists and has these options; a group alone will do."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        either = words[0].split("|")
        assert set(either) <= set(command.commands), words
        command, words = command.commands[either[0]], words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words


def check_compose(words: list[str]) -> None:
    """Profiles and services are those of docker-compose.yml; what runs in one of them is ours."""
    told = dict(pairwise(words))
    profiles = {profile for one in SERVICES.values() for profile in one["profiles"]}
    assert {told["--profile"]} <= profiles if "--profile" in told else True
    verbs = {word for word in words if word in {"up", "ps", "stop", "exec"}}
    assert len(verbs) == 1, words
    if "exec" in told:
        assert told["exec"] in SERVICES
        check_words(words[words.index("exec") + 2 :])


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
        case "postroom" if line.startswith("postroom simulator"):
            options = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
            assert options <= {"port"} | set(simulator_settings.HELP)
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


def test_the_python_of_messages_is_python() -> None:
    """README's is run with its commands."""
    known: dict[str, Any] = {"Message": Message, "Attachment": Attachment, "logo_bytes": b"logo"}
    for block in blocks(ROOT / "docs" / "messages.md", "python"):
        exec(block, known)
    assert known["EMAIL_BACKEND"] == "worker.django.EmailBackend"


def test_the_environment_of_docker_has_settings_and_profiles_that_exist() -> None:
    """A name that nobody reads would be without effect."""
    [text] = blocks(ROOT / "docs" / "operating.md", "env")
    given = dict(line.split("=", 1) for line in text.splitlines())
    assert [given.pop("COMPOSE_PROFILES")] in [one["profiles"] for one in SERVICES.values()]
    assert set(given) <= SETTINGS
    assert json.loads(given["POSTROOM_POOLS"])


def test_flowers_api_is_called_as_in_its_test() -> None:
    """tests/test_flower.py makes the call and looks what comes of it."""
    [text] = blocks(ROOT / "docs" / "operating.md", "console")
    words = shlex.split(text)
    [url] = [word for word in words if word.startswith("http://")]
    path = url.removeprefix("http://127.0.0.1:5555")
    assert f'"{path}", {{"args": [batch]}}' in (ROOT / "tests" / "test_flower.py").read_text()
    assert json.loads(words[words.index("-d") + 1]) == {"args": ["ID"]}


@postgresql_only
def test_the_sql_of_scaling_is_sql(migrated_url: str) -> None:
    """That of security.md is run in tests/test_retention.py."""
    with opened(migrated_url) as kit:
        for block in blocks(ROOT / "docs" / "scaling.md", "sql"):
            kit.sql(block)


def test_pictures_are_small_and_shown() -> None:
    """tests/test_browser.py makes them; a reader should not wait for them."""
    shown = {link for document in DOCUMENTS for link in _LINK.findall(document.read_text())}
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert {path.name for path in pictures} == {
        Path(link).name for link in shown if link.endswith(".png")
    }
    assert max(path.stat().st_size for path in pictures) < 150_000


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
