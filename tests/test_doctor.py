"""The doctor: every message it can say is said here once, against real parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from tests.support import Processes, free_port, wait_until
from worker.client import Client
from worker.config import Settings
from worker.doctor import Check, Status, Visit, examine, letter, microsoft, servers, service
from worker.doctor.words import explain
from worker.meanings.bounces import quota_reason
from worker.meanings.entra import ENTRA
from worker.model import Answer, Found, Message, Unknown
from worker.policy import classify
from worker.report import ALIVE, BEAT
from worker.runtime import Runtime
from worker.servers import RedisServer
from worker.simulator import Simulator
from worker.store.mailboxes import suspend_for

SENDER = "notices@contoso.com"
OTHER = "director@contoso.com"

Doctor = Callable[..., dict[str, Check]]


@pytest.fixture
def database_kind() -> str:
    """One suffices: the doctor asks both in the same words."""
    return "sqlite"


@pytest.fixture(scope="module")
def _simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator(tmp_path_factory.mktemp("simulator")) as running:
        yield running


@pytest.fixture
def entra(_simulator: Simulator) -> Iterator[Simulator]:
    """Microsoft's side as it should be; what a test changes is put back."""
    before = _simulator.settings()
    yield _simulator
    _simulator.clear_faults()
    _simulator.settings(**before)


@pytest.fixture
def environment(
    entra: Simulator, redis_url: str, migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of a service that is set up well."""
    settings = entra.environment() | {
        "POSTROOM_REDIS_URL": redis_url,
        "POSTROOM_DATABASE_URL": migrated_url,
        "POSTROOM_POOLS": json.dumps({"notices": [SENDER]}),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def doctor(environment: None) -> Doctor:
    """One visit: the checks by name, of those with the same name the last."""

    def visit(**words: Any) -> dict[str, Check]:
        return {check.name: check for check in examine(flower="http://127.0.0.1:9", **words)}

    return visit


def assert_says(check: Check, status: Status, detail: str, fix: str = "") -> None:
    assert check.status is status, check
    assert detail in check.detail
    assert fix in (check.fix or "")
    assert (check.fix is not None) == (status in {Status.WARN, Status.FAIL})


# ---- all is well, and the command ---------------------------------------------------------------


def test_a_service_that_is_set_up_well_has_no_failed_check(
    doctor: Doctor, entra: Simulator
) -> None:
    """Every step of the set-up is proven, and not one mail was sent."""
    entra.settings(out_of_scope=[OTHER])

    checks = doctor(mailbox=SENDER, outside=OTHER)

    well = {name for name, check in checks.items() if check.status is Status.OK}
    assert well == {
        "settings", "redis", "redis append-only", "redis eviction", "redis memory", "database",
        "database tables", "clocks", "entra", "credential", "roles", "mailbox", "outside",
        "mailboxes", "limits",
    }  # fmt: skip
    assert not [check for check in checks.values() if check.status is Status.FAIL]
    assert entra.ledger() == []


def test_the_command_prints_one_document_and_ends_with_1_where_a_check_failed(
    environment: None, entra: Simulator
) -> None:
    """For programs: names, statuses, details, fixes; for the shell: the exit status."""
    command = [str(Path(sys.executable).with_name("postroom")), "doctor", "--json"]
    well = subprocess.run(command, capture_output=True, text=True, check=False)
    entra.settings(secret_expired=True)
    ill = subprocess.run(command, capture_output=True, text=True, check=False)

    assert well.returncode == 0, well.stderr
    assert {tuple(one) for one in json.loads(well.stdout)["checks"]} == {
        ("name", "status", "detail", "fix")
    }
    assert ill.returncode == 1
    assert ill.stderr == "postroom: 1 of 21 checks failed: credential\n"
    [credential] = [c for c in json.loads(ill.stdout)["checks"] if c["name"] == "credential"]
    assert credential["status"] == "fail"


def test_people_read_each_check_with_what_to_do_below_it(
    environment: None, entra: Simulator
) -> None:
    """The same, as lines."""
    entra.settings(client_disabled=True)
    command = [str(Path(sys.executable).with_name("postroom")), "doctor"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    lines = done.stdout.splitlines()
    at = lines.index("FAIL  credential: The application is disabled. (AADSTS7000112)")
    assert lines[at + 1].startswith("        -> In Entra: Enterprise applications")
    assert "ok    settings: all that is needed is set" in lines


def test_send_without_a_mailbox_is_wrong_usage(environment: None) -> None:
    """Whom the mail is from must be said."""
    command = [str(Path(sys.executable).with_name("postroom")), "doctor", "--send"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


# ---- settings -----------------------------------------------------------------------------------


def test_settings_that_cannot_be_read_end_the_visit(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are named in one line."""
    monkeypatch.setenv("POSTROOM_LEASE", "soon")
    monkeypatch.setenv("POSTROOM_MAX_ATTEMPTS", "none")
    checks = doctor()
    assert list(checks) == ["settings"]
    assert_says(checks["settings"], Status.FAIL, "POSTROOM_LEASE", "correct it")
    assert "POSTROOM_MAX_ATTEMPTS" in checks["settings"].detail


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DATABASE_URL", "POSTROOM_DATABASE_URL is not set"),
        ("TENANT_ID", "POSTROOM_TENANT_ID must be set"),
        ("CLIENT_SECRET", "neither POSTROOM_CLIENT_SECRET nor POSTROOM_CLIENT_CERTIFICATE"),
    ],
)
def test_a_setting_that_is_absent_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """And what stands on it is skipped or fails in its own words."""
    monkeypatch.delenv(f"POSTROOM_{name}")
    checks = doctor(mailbox=SENDER)
    assert_says(checks["settings"], Status.FAIL, said, "set it")
    assert checks["credential" if name != "DATABASE_URL" else "database"].status is not Status.OK


def test_a_secret_file_that_cannot_be_read_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its setting, without its path."""
    monkeypatch.delenv("POSTROOM_CLIENT_SECRET")
    monkeypatch.setenv("POSTROOM_CLIENT_SECRET_FILE", "/nowhere/secret")
    assert_says(doctor()["settings"], Status.FAIL, "POSTROOM_CLIENT_SECRET_FILE cannot be read")


def test_a_misspelt_setting_is_told_with_the_one_that_is_meant(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no effect, which nobody would notice otherwise."""
    monkeypatch.setenv("POSTROOM_CLIENT_SECRET_FLIE", "x")
    checks = [check for check in examine() if check.name == "settings"]
    assert_says(checks[0], Status.WARN, "POSTROOM_CLIENT_SECRET_FLIE is no setting; "
                "is POSTROOM_CLIENT_SECRET_FILE meant?", "correct or remove")  # fmt: skip


# ---- Redis --------------------------------------------------------------------------------------


def test_a_redis_that_does_not_answer_is_named_and_the_rest_goes_on(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands on it is skipped, not failed."""
    monkeypatch.setenv("POSTROOM_REDIS_URL", "redis://127.0.0.1:9/0")
    checks = doctor(mailbox=SENDER, outside=OTHER)
    assert_says(checks["redis"], Status.FAIL, "Redis does not answer", "POSTROOM_REDIS_URL")
    assert checks["credential"].status is Status.OK
    assert checks["database tables"].status is Status.OK
    for name in ("mailbox", "outside", "workers", "beat"):
        assert checks[name].status is Status.SKIP


@pytest.mark.parametrize(
    ("settings", "name", "status", "detail"),
    [
        ({"appendonly": "no"}, "redis append-only", Status.FAIL, "keeps nothing over a restart"),
        ({"appendfsync": "no"}, "redis append-only", Status.WARN, "left to the system"),
        ({"maxmemory-policy": "allkeys-lru"}, "redis eviction", Status.FAIL, "(allkeys-lru)"),
        ({"maxmemory": "0"}, "redis memory", Status.WARN, "no limit"),
        ({"maxmemory": "300000000"}, "redis memory", Status.WARN, "the inbox may take 268 MB"),
        ({"maxmemory": "1100000"}, "redis memory", Status.WARN, "are used"),
    ],
)
def test_what_endangers_the_inbox_is_told(
    doctor: Doctor, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str], name: str, status: Status, detail: str,
) -> None:  # fmt: skip
    """Each with the line for redis.conf."""
    monkeypatch.setenv("POSTROOM_REDIS_URL", own_redis.url)
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set(*next(iter(settings.items())))
    assert_says(doctor()[name], status, detail, next(iter(settings)).partition("-")[0])


def test_a_replica_is_refused(
    doctor: Doctor, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be written there."""
    monkeypatch.setenv("POSTROOM_REDIS_URL", own_redis.url)
    with redis.Redis.from_url(own_redis.url) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "9")
    assert_says(doctor()["redis"], Status.FAIL, "read-only replica", "primary")


@pytest.mark.parametrize(
    ("forbidden", "name", "status", "detail"),
    [
        ("-config", "redis append-only", Status.OK, "CONFIG is forbidden"),
        ("-info", "redis", Status.WARN, "INFO is forbidden"),
    ],
)
def test_what_a_hosted_redis_does_not_tell_is_called_so(
    doctor: Doctor, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch,
    forbidden: str, name: str, status: Status, detail: str,
) -> None:  # fmt: skip
    """That a question is forbidden is no fault."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "hosted", "on", ">pw", "~*", "&*", "+@all", forbidden
        )
    monkeypatch.setenv("POSTROOM_REDIS_URL", own_redis.url.replace("unix://", "unix://hosted:pw@"))
    checks = doctor(mailbox=SENDER)
    assert_says(checks[name], status, detail)
    assert checks["mailbox"].status is Status.OK, "Redis works all the same"


def test_what_this_redis_cannot_be_made_to_show_is_told_as_well() -> None:
    """An old version, a full disk, and an INFO that leaves things out."""
    old = servers.version_of({"redis_version": "5.0.14"})
    assert_says(old, Status.FAIL, "Redis 5.0.14 is too old", "6.2")
    full = servers.append_only({"aof_enabled": 1, "aof_last_write_status": "err"}, "everysec")
    assert_says(full, Status.FAIL, "cannot write its file", "disk")
    for check in (servers.append_only({}, None), servers.eviction({}), servers.memory({}, 1)):
        assert_says(check, Status.WARN, "cannot tell", "make sure of")


# ---- the database and the clocks ----------------------------------------------------------------


def test_a_database_that_does_not_answer_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no value of its address that may be secret."""
    url = "postgresql+psycopg://u:canary@127.0.0.1:9/postroom"
    monkeypatch.setenv("POSTROOM_DATABASE_URL", url)
    checks = doctor()
    assert_says(checks["database"], Status.FAIL, "does not answer", "POSTROOM_DATABASE_URL")
    assert "canary" not in repr(checks)


def test_a_url_that_is_none_is_named(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two forms that are."""
    monkeypatch.setenv("POSTROOM_DATABASE_URL", "mysql://x/y")
    assert_says(doctor()["database"], Status.FAIL, "mysql is not one of", "POSTROOM_DATABASE_URL")


def test_a_database_without_tables_is_told_the_command(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one thing to do is postroom db upgrade."""
    monkeypatch.setenv("POSTROOM_DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    checks = doctor()
    assert_says(checks["database tables"], Status.FAIL, "there are none", "postroom db upgrade")
    assert checks["limits"].status is Status.SKIP


def test_a_database_of_an_older_release_is_told_the_command(
    doctor: Doctor, migrated_url: str
) -> None:
    """With both revisions."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(migrated_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE postroom_version SET version_num = '0001'")
    engine.dispose()
    assert_says(doctor()["database tables"], Status.FAIL, "at revision 0001, not", "db upgrade")


@pytest.mark.parametrize(
    ("apart", "signs", "status"),
    [(0.0, True, Status.OK), (30.0, True, Status.WARN), (300.0, False, Status.WARN),
     (300.0, True, Status.FAIL)],
)  # fmt: skip
def test_clocks_that_differ_are_told_and_matter_to_assertions(
    environment: None, monkeypatch: pytest.MonkeyPatch, apart: float, signs: bool, status: Status
) -> None:
    """A certificate's assertion has times in it; a secret has none."""
    if signs:
        monkeypatch.delenv("POSTROOM_CLIENT_SECRET")
        monkeypatch.setenv("POSTROOM_CLIENT_CERTIFICATE", "a certificate")
    rt = Runtime(Settings.from_env())
    visit = Visit(rt, redis_works=True, tables_work=True, microsofts_clock=apart)
    [check] = servers.clocks(visit)
    rt.close()
    assert_says(check, status, "the database", "NTP" if status is not Status.OK else "")


# ---- Microsoft ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [302, 405])
def test_an_answer_of_somebody_else_is_no_proof_of_a_right(status: int) -> None:
    """A proxy that redirects has not looked at the mailbox."""
    for judge in (microsoft.inside, microsoft.refused):
        check = judge(SENDER, classify(Answer(status=status)))
        assert_says(check, Status.WARN, f"no clear answer ({status}")


@pytest.mark.parametrize("code", sorted(ENTRA))
def test_each_refusal_of_entra_is_told_in_plain_words(
    doctor: Doctor, entra: Simulator, code: str
) -> None:
    """With its number, and the one thing to do."""
    body = {"error": "invalid_client", "error_codes": [int(code.removeprefix("AADSTS"))],
            "error_description": f"{code}: words of Entra"}  # fmt: skip
    entra.fault("token_status", 0, status=401, body=body)
    checks = doctor(mailbox=SENDER)
    assert_says(checks["credential"], Status.FAIL, ENTRA[code].text, ENTRA[code].advice)
    assert code in checks["credential"].detail
    assert checks["mailbox"].status is Status.SKIP


@pytest.mark.parametrize(
    ("change", "number"),
    [({"secret_expired": True}, 7000222), ({"client_disabled": True}, 7000112),
     ({"client_secret": "another"}, 7000215),
     ({"client_id": "00000000-0000-0000-0000-000000000000"}, 700016),
     ({"tenant_id": "00000000-0000-0000-0000-000000000000"}, 90002)],
)  # fmt: skip
def test_what_is_wrong_with_the_application_is_told(
    doctor: Doctor, entra: Simulator, change: dict[str, Any], number: int
) -> None:
    """As Entra itself says it, asked afresh at each visit."""
    assert doctor()["credential"].status is Status.OK
    entra.settings(**change)
    known = ENTRA[f"AADSTS{number}"]
    assert_says(doctor()["credential"], Status.FAIL, known.text, known.advice)


@pytest.mark.parametrize(
    ("code", "detail", "meaning", "fix"),
    [
        ("AADSTS4711", "some words", "some words", "https://login.microsoftonline.com/error?code=4711"),
        ("HTTP502", "", "login answered 502", "Run the doctor again"),
        ("ConnectError", "[SSL: CERTIFICATE_VERIFY_FAILED] x", "not trusted", "POSTROOM_CA_BUNDLE"),
        ("ConnectError", "no route", "login cannot be reached: no route", "HTTPS_PROXY"),
        ("ValueError", "Unable to load PEM", "Unable to load PEM", "POSTROOM_AUTHORITY"),
    ],
)  # fmt: skip
def test_other_failures_of_a_token_request_have_words_too(
    code: str, detail: str, meaning: str, fix: str
) -> None:
    """Unknown numbers, gateways, TLS and the network."""
    said = explain(code, detail, "login")
    assert meaning in said[0]
    assert fix in said[1]


def test_an_entra_that_cannot_be_reached_or_trusted_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First the way there, then the credential."""
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    monkeypatch.setenv("POSTROOM_CA_BUNDLE", str(tmp_path / "other.pem"))
    assert_says(doctor()["entra"], Status.FAIL, "is not trusted here", "POSTROOM_CA_BUNDLE")
    monkeypatch.setenv("POSTROOM_AUTHORITY", "https://127.0.0.1:9")
    assert_says(doctor()["entra"], Status.FAIL, "127.0.0.1:9 cannot be reached", "proxy")


@pytest.mark.parametrize(
    ("days", "status", "detail"),
    [(-1, Status.FAIL, "it ended on"), (10, Status.WARN, "it ends on"), (90, Status.OK, "until")],
)
def test_the_end_of_a_certificate_is_told_in_time(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, days: int, status: Status,
    detail: str,
) -> None:  # fmt: skip
    """A month before it happens."""
    until = datetime.now(UTC) + timedelta(days=days, hours=1)
    made = trustme.CA().issue_cert("postroom", not_after=until, key_type=trustme.KeyType.RSA)
    made.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    monkeypatch.delenv("POSTROOM_CLIENT_SECRET")
    monkeypatch.setenv("POSTROOM_CLIENT_CERTIFICATE_FILE", str(tmp_path / "client.pem"))
    assert_says(doctor()["certificate"], status, detail, "" if days > 30 else "step 4")


def test_a_certificate_that_cannot_be_read_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The credential then fails in MSAL's words."""
    monkeypatch.delenv("POSTROOM_CLIENT_SECRET")
    monkeypatch.setenv("POSTROOM_CLIENT_CERTIFICATE", "no PEM")
    assert_says(doctor()["settings"], Status.FAIL, "POSTROOM_CLIENT_CERTIFICATE cannot be read")
    monkeypatch.setenv("POSTROOM_CLIENT_CERTIFICATE", "-----BEGIN nothing")
    checks = doctor()
    assert_says(checks["certificate"], Status.FAIL, "cannot be read", "one PEM")
    assert checks["credential"].status is Status.FAIL


def test_a_token_without_roles_is_no_failure(doctor: Doctor, entra: Simulator) -> None:
    """With RBAC for Applications the scope stands in Exchange, not in the token."""
    entra.settings(mail_send=False)
    checks = doctor(mailbox=SENDER)
    assert_says(
        checks["roles"], Status.WARN, "carries no Mail.Send (Mail.Read, Mail.ReadWrite)", "step 3"
    )
    assert_says(checks["mailbox"], Status.FAIL, "access is denied (ErrorAccessDenied)", "step")


def test_looking_into_mailboxes_needs_its_role(
    doctor: Doctor, entra: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ON_UNKNOWN=reconcile without Mail.Read settles nothing."""
    entra.settings(mail_read=False, mail_read_write=False)
    assert doctor()["roles"].status is Status.OK
    monkeypatch.setenv("POSTROOM_ON_UNKNOWN", "reconcile")
    assert_says(doctor()["roles"], Status.WARN, "needs Mail.Read", "step 2")


@pytest.mark.parametrize(
    ("settings", "detail", "fix"),
    [
        ({"out_of_scope": [SENDER]}, "is outside the application's scope", "up to two hours"),
        ({"mailboxes": ["else@contoso.com"]}, "there is no such mailbox", "correct the address"),
    ],
)
def test_a_mailbox_that_cannot_be_sent_from_is_told(
    doctor: Doctor, entra: Simulator, settings: dict[str, Any], detail: str, fix: str
) -> None:
    """With the step that mends it."""
    entra.settings(**settings)
    assert_says(doctor(mailbox=SENDER)["mailbox"], Status.FAIL, detail, fix)


def test_a_mailbox_outside_that_is_not_refused_is_a_failure(
    doctor: Doctor, entra: Simulator
) -> None:
    """The application could send in anybody's name."""
    assert_says(doctor(outside=OTHER)["outside"], Status.FAIL, "is not refused", "step 5")
    entra.settings(mailboxes=[SENDER])
    assert_says(doctor(outside=OTHER)["outside"], Status.WARN, "proves nothing", "one that exists")
    assert entra.ledger() == []


def test_a_graph_of_another_cloud_refuses_the_token(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Entra and Graph must belong together; that is not the mailbox's fault."""
    with Simulator(tmp_path / "other") as other:
        bundle = tmp_path / "both.pem"
        own = Path(str(Settings.from_env().ca_bundle)).read_text()
        bundle.write_text(own + Path(other.ca_bundle).read_text())
        monkeypatch.setenv("POSTROOM_CA_BUNDLE", str(bundle))
        monkeypatch.setenv("POSTROOM_GRAPH_URL", other.url)
        checks = doctor(mailbox=SENDER, outside=OTHER)
    for name in ("mailbox", "outside"):
        assert_says(checks[name], Status.FAIL, "Graph refuses the token (401", "the same cloud")


def test_a_throttled_mailbox_is_neither_good_nor_bad_news(doctor: Doctor, entra: Simulator) -> None:
    """Nor one to which Graph gives no clear answer."""
    address = "throttled@contoso.com"
    entra.settings(request_limit=1)
    checks = doctor(mailbox=address, outside=address)
    assert checks["mailbox"].status is Status.OK
    assert_says(checks["outside"], Status.WARN, "is being throttled (429", "again in a minute")
    for judge in (microsoft.inside, microsoft.refused):
        said = judge(SENDER, Unknown(Answer(status=503, code="ErrorServerBusy")))
        assert_says(said, Status.WARN, "no clear answer (503 ErrorServerBusy)", "again")


def test_a_graph_that_cannot_be_reached_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is there, the way to Graph is not."""
    monkeypatch.setenv("POSTROOM_GRAPH_URL", "https://127.0.0.1:9")
    checks = doctor(mailbox=SENDER)
    assert_says(checks["mailbox"], Status.FAIL, "Graph cannot be reached", "POSTROOM_GRAPH_URL")


def test_the_doctor_waits_for_a_lane_and_respects_its_rest(
    environment: None, entra: Simulator, doctor: Doctor
) -> None:
    """Never more requests at once than the workers may make."""
    rt = Runtime(Settings.from_env())
    rt.call(rt.gate.cool(SENDER, timedelta(seconds=60)))
    rt.close()
    assert_says(doctor(mailbox=SENDER)["mailbox"], Status.WARN, "it rests for", "when the mailbox")


# ---- a real mail ---------------------------------------------------------------------------------


def test_one_real_mail_is_sent_to_the_mailbox_itself_and_found_again(
    doctor: Doctor, entra: Simulator
) -> None:
    """By its marker, with the delay told; what one mail cannot answer stays open."""
    address = "letter@contoso.com"
    entra.settings(search_delay=1.0)
    checks = doctor(mailbox=address, send=True)
    assert_says(checks["letter"], Status.OK, f"sent to {address}, and found by its marker after ")
    seconds = float(checks["letter"].detail.split()[-2])
    assert seconds >= 1.0
    [mail] = [row for row in entra.ledger() if row["mailbox"] == address]
    assert mail["recipients"] == [address]
    assert mail["subject"] == f"Postroom doctor {mail['marker']}"
    assert_says(checks["marker on the sent copy"], Status.OK, "yes")
    still = {name for name, check in checks.items() if check.status is Status.OPEN}
    assert still == {"roles with RBAC", "time in Drafts", "messages a minute", "503 on sendMail",
                     "immutable id", "second send of a draft"}  # fmt: skip


def test_a_mail_that_may_not_be_looked_for_is_left_to_a_person(
    doctor: Doctor, entra: Simulator
) -> None:
    """Without Mail.Read the subject tells which mail it is."""
    entra.settings(mail_read=False, mail_read_write=False)
    checks = doctor(mailbox=SENDER, send=True)
    assert_says(checks["letter"], Status.WARN, "without Mail.Read", "Postroom doctor ")
    assert checks["marker on the sent copy"].status is Status.OPEN


def test_a_mail_that_is_accepted_and_never_found_is_a_failure(
    doctor: Doctor, entra: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks could not settle any doubt in such a tenant."""
    monkeypatch.setattr(letter, "PATIENCE", timedelta(0))
    entra.settings(search_delay=600)
    checks = doctor(mailbox=SENDER, send=True)
    assert_says(checks["letter"], Status.FAIL, "was not found", "POSTROOM_ON_UNKNOWN=hold")


def test_no_mail_is_sent_from_a_mailbox_that_may_not(doctor: Doctor, entra: Simulator) -> None:
    """Nor where Graph refuses it in the end."""
    before = len(entra.ledger())
    assert_says(doctor(mailbox=SENDER)["letter"], Status.SKIP, "--send sends one real mail")
    entra.fault("status", 0, status=503, code="ErrorServerBusy", operation="send")
    assert_says(doctor(mailbox=SENDER, send=True)["letter"], Status.WARN, "no clear answer (503")
    entra.settings(out_of_scope=[SENDER])
    assert_says(doctor(mailbox=SENDER, send=True)["letter"], Status.SKIP, "not sent")
    assert len(entra.ledger()) == before


def test_a_scope_by_rbac_alone_answers_whether_it_shows_in_the_roles() -> None:
    """The simulator knows no RBAC, so the finding is given here."""
    visit = Visit(Runtime(Settings()), roles=frozenset())
    found = {check.name: check for check in letter.questions(visit, Found(Answer(status=200)))}
    assert_says(found["roles with RBAC"], Status.OK, "no: the mail was accepted on a token without")


# ---- the service --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "detail"),
    [
        ({"empty": []}, "pool empty has no mailbox"),
        ({"a": [SENDER], "b": [SENDER]}, f"{SENDER} is in 2 pools"),
        ({"a": ["x@contoso.onmicrosoft.com"]}, "100 external recipients a day"),
    ],
)
def test_pools_that_cannot_do_what_they_seem_to_are_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, pools: dict[str, list[str]], detail: str
) -> None:
    """Before the batch is on its way."""
    monkeypatch.setenv("POSTROOM_POOLS", json.dumps(pools))
    assert_says(doctor()["limits"], Status.WARN, detail, "pool set")


@pytest.mark.parametrize(
    ("name", "rate", "detail"),
    [
        ("RECIPIENT", "500/h", "recipients 500/1h, but Microsoft allows 10000/24h"),
        ("RECIPIENT", "off", "recipients off, but"),
        ("REQUEST", "20000/20min", "requests 20000/20min, but Microsoft allows 10000/10min"),
        ("UPLOAD", "1GB/h", "upload 1000000000/1h, but"),
    ],
)
def test_limits_above_microsofts_are_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, name: str, rate: str, detail: str
) -> None:
    """Whatever time they are given for: what is over is throttled, or bounces."""
    monkeypatch.setenv(f"POSTROOM_MAILBOX_{name}_RATE", rate)
    assert_says(doctor()["limits"], Status.WARN, f"the settings: {detail}", "lower POSTROOM_")


def test_the_limits_of_one_mailbox_count_for_its_pool(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pool can do in a day is told, and the one that would do too much is named."""
    monkeypatch.setenv("POSTROOM_POOLS", json.dumps({"two": [SENDER, OTHER]}))
    rt = Runtime(Settings.from_env())
    client = Client(lambda: rt)
    client.set_mailbox(OTHER, {"recipient_rate": "300/h"})
    lower = doctor()["limits"]
    client.set_mailbox(OTHER, {"recipient_rate": "20000/24h"})
    above = doctor()["limits"]
    rt.close()

    assert_says(lower, Status.OK, "pool two: 2 mailboxes, 16,700 recipients a day")
    assert_says(above, Status.WARN, f"{OTHER}: recipients 20000/24h, but", "mailbox set")


def test_a_mailbox_that_an_operator_suspended_is_only_worth_a_word(doctor: Doctor) -> None:
    """It is meant so. One that was suspended for refusing: tests/test_first_screen.py."""
    rt = Runtime(Settings.from_env())
    for address in (OTHER, SENDER):
        Client(lambda: rt).suspend_mailbox(address, by="ann", why="on leave")
    rt.close()
    assert_says(doctor()["mailboxes"], Status.WARN, f"{OTHER} is suspended: suspended by ann: on "
                "leave (Suspended); and 1 more", f"mailbox resume {OTHER}")  # fmt: skip


@pytest.mark.parametrize(("code", "whom"), [("5.1.90", SENDER), ("5.7.233", "--all")])
def test_a_mailbox_whose_mail_is_not_delivered_waits_for_an_operator(
    doctor: Doctor, code: str, whom: str
) -> None:
    """No probe can tell when its quota is over; one of the tenant stops all."""
    rt = Runtime(Settings.from_env())
    with rt.store.engine.begin() as connection:
        suspend_for(connection, SENDER, code, quota_reason(code))
    rt.close()
    assert_says(doctor()["mailboxes"], Status.FAIL, f"{SENDER} is suspended: ",
                f"lets it send again, run: postroom mailbox resume {whom}")  # fmt: skip


def test_the_tenants_own_limit_is_told_with_its_formula(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer of Graph ever speaks of it."""
    assert_says(doctor()["external recipients"], Status.WARN, "500 x licences^0.7 + 9,500",
                "POSTROOM_TENANT_EXTERNAL_RATE")  # fmt: skip
    monkeypatch.setenv("POSTROOM_TENANT_EXTERNAL_RATE", "22000/24h")
    assert_says(doctor()["external recipients"], Status.OK, "22000/24h for all mailboxes")


def test_a_missing_worker_is_a_failure_only_when_messages_wait(
    doctor: Doctor, redis_client: redis.Redis
) -> None:
    """While a service is being set up there is none yet."""
    assert_says(doctor()["workers"], Status.WARN, "none is running", "celery -A worker worker")
    rt = Runtime(Settings.from_env())
    Client(lambda: rt).enqueue([Message("a@fabrikam.com", "Hi", text="Hi")], sender=SENDER)
    rt.close()
    assert_says(doctor()["workers"], Status.FAIL, "messages wait", "celery -A worker worker")
    redis_client.set(f"{ALIVE}one", "1", ex=60)
    assert_says(doctor()["workers"], Status.OK, "1 running")


def test_a_beat_that_is_not_heard_is_worth_a_word(
    doctor: Doctor, redis_client: redis.Redis
) -> None:
    """No more: the workers tick by themselves."""
    assert_says(doctor()["beat"], Status.WARN, "no ring", "celery -A worker beat")
    redis_client.set(BEAT, "1", ex=60)
    assert_says(doctor()["beat"], Status.OK, "it rings")


def test_what_flower_shows_to_whom_is_told(environment: None, processes: Processes) -> None:
    """Open API, open pages, open to the network, and as it should be."""
    rt = Runtime(Settings.from_env())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    open_api = {"FLOWER_UNAUTHENTICATED_API": "true"}
    for options, more, status, detail in (
        (["--address=127.0.0.1"], open_api, Status.FAIL, "its API at"),
        (["--address=127.0.0.1"], {}, Status.WARN, "ask for no password"),
        (["--address=0.0.0.0", "--basic-auth=a:b"], {}, Status.WARN, "listens on"),
        (["--address=127.0.0.1", "--basic-auth=a:b"], {}, Status.OK, "asks for a password"),
    ):
        [none] = service.flower(Visit(rt, flower=url))
        assert none.status is Status.SKIP
        command = ["celery", "-A", "worker", "flower", f"--port={port}", *options]
        names = ("REDIS_URL", "DATABASE_URL")
        settings = {f"POSTROOM_{name}": getattr(rt.settings, name.lower()) for name in names}
        child = processes.start(command, env=settings | more, log="flower")

        def heard() -> list[Check]:
            checks = service.flower(Visit(rt, flower=url))
            return [check for check in checks if check.status is not Status.SKIP]

        assert_says(wait_until(heard, "Flower answers", 60)[0], status, detail)
        child.stop()
    rt.close()
