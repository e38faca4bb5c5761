"""The shared token: real MSAL, real Redis, and the simulator as Entra, over TLS."""

import json
import logging
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from cryptography.fernet import Fernet
from redis.backoff import NoBackoff
from redis.retry import Retry

import worker
from worker.simulator import Simulator
from worker.tokens import TokenRefused, Tokens

#: What each process of a test runs: eight threads that ask together once a line comes in.
ASK_IN_THREADS = """
import json, sys, threading
from datetime import timedelta
from redis import Redis
from worker.tokens import Tokens, TokenRefused
url, arguments = json.loads(sys.argv[1])
tokens = Tokens(Redis.from_url(url), **arguments, margin=timedelta(minutes=5))
together, answers = threading.Barrier(8), []
def ask():
    together.wait()
    try:
        answers.append(["token", tokens.get().serial])
    except TokenRefused as refused:
        answers.append([refused.code, refused.wait.total_seconds(), str(refused)])
threads = [threading.Thread(target=ask) for _ in range(8)]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    """One Entra for all tests of this module; each has a tenant's worth of keys in Redis."""
    with Simulator(tmp_path_factory.mktemp("entra")) as running:
        yield running


@pytest.fixture
def entra(simulator, redis_url):
    """The simulator with its defaults, and nothing of tokens in Redis."""
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter("postroom:token:*"):
            client.delete(key)
    simulator.clear_faults()
    simulator.settings(token_lifetime=3599)
    yield simulator
    simulator.clear_faults()
    simulator.settings(token_lifetime=3599)


def arguments(entra, **changes):
    return {
        "authority": entra.url,
        "tenant_id": entra.tenant_id,
        "client_id": entra.client_id,
        "credential": entra.client_secret,
        "scope": f"{entra.url}/.default",
        "ca_bundle": entra.ca_bundle,
        **changes,
    }


@pytest.fixture
def make(entra, redis_url):
    """Makes Tokens as a process of its own would have them."""
    made = []

    def one(url=redis_url, **changes):
        client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0))
        changes.setdefault("margin", timedelta(minutes=5))
        tokens = Tokens(client, **arguments(entra, **changes))
        made.append((tokens, client))
        return tokens

    yield one
    for tokens, client in made:
        tokens.close()
        client.close()


@pytest.fixture
def asked(entra):
    """How many token requests came since the test began."""
    before = entra.stats()["token_requests"]
    return lambda: entra.stats()["token_requests"] - before


def refusal(tokens) -> TokenRefused:
    with pytest.raises(TokenRefused) as caught:
        tokens.get()
    return caught.value


def refusal_if_any(tokens: Tokens) -> TokenRefused | None:
    try:
        tokens.get()
    except TokenRefused as refused:
        return refused
    return None


def until(predicate, seconds=20.0):
    """Waits for a fact; fails where it does not come about."""
    end = time.monotonic() + seconds
    while not (found := predicate()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def due(tokens) -> bool:
    """The token at hand is to be looked at again."""
    return tokens.at_hand() is None


def in_processes(entra, redis_url, **changes) -> list[Any]:
    """The answers of 3 processes with 8 threads each, all asking at once."""
    given = json.dumps([redis_url, arguments(entra, **changes)])
    processes: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", ASK_IN_THREADS, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(worker.__file__).parent.parent,
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [a for p in processes for a in json.loads(p.communicate(timeout=60)[0])]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_processes_that_start_together_fetch_one_token(entra, redis_url, asked):
    """MSAL has no single flight of its own: 24 askers would make 24 requests."""
    answers = in_processes(entra, redis_url)
    assert len(answers) == 24
    assert {word for word, *_ in answers} == {"token"}
    assert len({serial for _, serial in answers}) == 1
    assert asked() == 1


def test_a_wrong_secret_is_told_to_all_and_asked_once(entra, redis_url, asked):
    """A refusal is remembered for every process, with Entra's number for people."""
    answers = in_processes(entra, redis_url, credential="canary-of-a-secret")
    assert {code for code, *_ in answers} == {"AADSTS7000215"}
    assert len(answers) == 24
    assert all(25 < wait <= 30 for _, wait, _ in answers)
    assert not any("canary" in text for *_, text in answers)
    assert asked() == 1


def test_a_corrected_secret_is_tried_at_once(make, asked):
    """The refusal of the old one does not hold for the new one."""
    refusal(make(credential="wrong"))
    assert make().get().value
    assert asked() == 2


def test_the_wait_after_refusals_doubles_to_a_quarter_of_an_hour(make, redis_url, asked):
    """One probe for all processes each time, ever more seldom."""
    tokens, waits = make(credential="wrong"), []
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(7):
            waits.append(round(refusal(tokens).wait.total_seconds()))
            refusal(tokens)  # within the wait: from memory of Redis, no request
            [trouble] = client.scan_iter("*:trouble:*")
            client.hset(trouble, "until", 0)
    assert waits == [30, 60, 120, 240, 480, 900, 900]
    assert asked() == 7


def test_an_unknown_tenant_and_application_are_named(make, entra):
    """Discovery fails where the tenant is wrong, and MSAL hides why; we do not."""
    assert refusal(make(tenant_id=str(uuid.uuid4()))).code == "AADSTS90002"
    assert refusal(make(client_id=str(uuid.uuid4()))).code == "AADSTS700016"


def test_a_revoked_token_is_renewed_once_for_all(make, entra, asked):
    """Fifty workers that meet a 401 with one token cause one renewal."""
    several = [make() for _ in range(10)]
    old = several[0].get()
    with ThreadPoolExecutor(50) as pool:

        def meet_401(n):
            tokens = several[n % 10]
            assert tokens.get().serial
            tokens.reject(old.serial, "InvalidAuthenticationToken")
            return tokens.get().serial

        serials = set(pool.map(meet_401, range(50)))
    assert len(serials) == 1
    assert old.serial not in serials
    assert asked() == 2


def test_a_fresh_token_that_graph_refuses_too_counts_as_refused(make, asked):
    """Otherwise a token that never works would be fetched as often as there are messages."""
    tokens = make()
    tokens.reject(tokens.get().serial, "InvalidAuthenticationToken")
    tokens.reject(tokens.get().serial, "InvalidAuthenticationToken")
    refused = refusal(tokens)
    assert refused.code == "InvalidAuthenticationToken"
    assert timedelta(seconds=25) < refused.wait <= timedelta(seconds=30)
    assert refusal(make()).code == refused.code, "all processes know"
    assert asked() == 2


def test_an_old_rejection_does_no_harm(make, asked):
    """A 401 that comes late, for a token of the past, takes nothing away from the new one."""
    tokens, other = make(), make()
    first = tokens.get()
    tokens.reject(first.serial, "x")
    second = tokens.get()
    other.get()
    other.reject(first.serial, "x")
    assert tokens.get().serial == other.get().serial == second.serial
    assert asked() == 2


def test_ca_bundles_in_the_environment_do_not_matter(make, tmp_path, monkeypatch):
    """The one that was set for Postroom wins; with MSAL's own client REQUESTS_CA_BUNDLE would."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(other))
    assert make().get().value
    untrusted = make(ca_bundle=str(other), tenant_id=str(uuid.uuid4()))
    assert refusal(untrusted).code == "ConnectError"


def test_a_failing_renewal_goes_on_with_the_old_token_while_it_is_good(
    make, entra, redis_url, asked
):
    """MSAL would raise on a 503 although its token lives; ours decides by its own record."""
    entra.settings(token_lifetime=10)
    tokens = make(margin=timedelta(seconds=9))
    old = tokens.get()
    entra.fault("token_status", 0, status=503, headers={"Retry-After": "300"})
    until(lambda: due(tokens))
    assert tokens.get().serial == old.serial
    assert asked() == 2, "it was tried"
    assert tokens.get().serial == old.serial
    assert asked() == 2, "but not again for each message"
    refused = until(lambda: refusal_if_any(tokens))  # once the old one has ended
    assert old.left < timedelta(0)
    assert refused.code == "AADSTS90033"
    assert timedelta(seconds=200) < refused.wait <= timedelta(seconds=300)
    assert asked() == 2, "nor now, for Entra said when to come back"
    entra.clear_faults()
    with redis.Redis.from_url(redis_url) as client:
        [trouble] = client.scan_iter("*:trouble:*")
        client.hset(trouble, "until", 0)  # as if the wait were over
    assert tokens.get().serial != old.serial


def test_a_renewal_before_the_end_blocks_nobody_else(make, entra, asked):
    """One renews; other threads and other processes go on with the old token meanwhile."""
    entra.settings(token_lifetime=60)
    tokens, other = (make(margin=timedelta(seconds=59)) for _ in range(2))
    old = tokens.get()
    until(lambda: due(tokens))
    entra.fault("token_delay", seconds=3)
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(tokens.get)
        until(lambda: asked() == 2)
        assert tokens.get() == old
        assert other.get().serial == old.serial
        assert not renewing.done()
        assert renewing.result().serial != old.serial
    assert asked() == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"kind": "token_status", "status": 429, "headers": {"Retry-After": "17"}}, "AADSTS90033"),
        ({"kind": "token_garbage"}, None),
        ({"kind": "token_reset"}, None),
    ],
)
def test_a_failure_that_passes_is_remembered_shortly(make, entra, asked, fault, code):
    """As long as Entra says, else about a second; the other processes do not ask meanwhile."""
    make_up = {k: v for k, v in fault.items() if k != "kind"}
    entra.fault(fault["kind"], 0, **make_up)
    refused = refusal(make())
    refusal(make())
    if code:
        assert refused.code == code
        assert timedelta(seconds=16) < refused.wait <= timedelta(seconds=17)
    else:
        assert refused.wait <= timedelta(seconds=1)
    assert asked() <= 1


def test_a_worker_that_died_while_fetching_is_waited_for_only_so_long(make, redis_url, asked):
    """The lock runs out by itself; then the next one fetches."""
    tokens = make()
    tokens.reject(tokens.get().serial, "x")
    with redis.Redis.from_url(redis_url) as client:
        [trouble] = client.scan_iter("*:trouble:*")
        lock = trouble.decode().rpartition(":trouble:")[0] + ":lock"
        client.set(lock, "dead", px=700)
        began = time.monotonic()
        assert tokens.get().value
    assert time.monotonic() - began > 0.5
    assert asked() == 2


def test_the_token_is_encrypted_in_redis_and_the_keys_can_be_changed(make, redis_url, asked):
    """With a key set, neither token nor secret can be read from Redis."""
    first, second = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    token = make(secret_keys=[first]).get()
    with redis.Redis.from_url(redis_url) as client:
        dump = b"".join(
            repr(client.hgetall(key)).encode() for key in client.scan_iter("postroom:token:*")
        )
    assert b"blob" in dump
    assert token.value.encode() not in dump
    assert make(secret_keys=[second, first]).get().serial == token.serial
    assert asked() == 1
    assert make(secret_keys=[second]).get().value, "what cannot be opened counts as absent"
    assert asked() == 2


def test_without_redis_a_good_token_goes_on_and_none_is_fetched(make, entra, redis_url, asked):
    """Redis gone means that the gate stops everything; the token is not the one to fail first."""
    name = f"u{uuid.uuid4().hex}"
    entra.settings(token_lifetime=30)
    with redis.Redis.from_url(redis_url) as client:
        client.acl_setuser(name, enabled=True, nopass=True, keys=["*"], commands=["+@all"])
        there = client.connection_pool.connection_kwargs
        path = there.get("path")
        url = (
            f"unix://{name}:x@{path}"
            if path
            else f"redis://{name}:x@{there['host']}:{there['port']}"
        )
        tokens, late = (make(url, margin=timedelta(seconds=29)) for _ in range(2))
        old = tokens.get()
        until(lambda: due(tokens))
        client.acl_deluser(name)
        assert tokens.get() == old
        with pytest.raises(redis.RedisError):
            late.get()
    assert asked() == 1


def test_the_record_in_redis_ends_with_the_token(make, entra, redis_url):
    """Nothing of it stays behind, and its end is what Entra said."""
    entra.settings(token_lifetime=100)
    token = make().get()
    assert timedelta(seconds=90) < token.left <= timedelta(seconds=100)
    with redis.Redis.from_url(redis_url) as client:
        keys = list(client.scan_iter("postroom:token:*"))
        assert all(0 < client.ttl(key) <= 7200 for key in keys)
        assert [key for key in keys if 0 < client.ttl(key) <= 100]


def test_no_secret_shows_in_logs_errors_or_repr(make, entra, caplog):
    """Not even with everything logged."""
    caplog.set_level(logging.DEBUG)
    refused = refusal(make(credential="canary-of-a-secret"))
    tokens = make()
    token = tokens.get()
    text = f"{caplog.text} {token!r} {refused!r} {refused} {vars(refused)} {tokens!r}"
    for secret in (token.value, entra.client_secret, "canary-of-a-secret"):
        assert secret not in text


def test_a_certificate_serves_as_well_as_a_secret(redis_url, tmp_path):
    """MSAL signs an assertion, which goes out over our client."""
    certificate = trustme.CA().issue_cert("client.contoso.com", key_type=trustme.KeyType.RSA)
    public = certificate.cert_chain_pems[0].bytes().decode()
    (tmp_path / "public.pem").write_text(public)
    credential = {
        "private_key": certificate.private_key_pem.bytes().decode(),
        "public_certificate": public,
    }
    with (
        Simulator(tmp_path / "entra", certificate=str(tmp_path / "public.pem")) as entra,
        redis.Redis.from_url(redis_url) as client,
    ):
        tokens = Tokens(
            client, **arguments(entra, credential=credential), margin=timedelta(minutes=5)
        )
        try:
            assert tokens.get().value
        finally:
            tokens.close()


def test_threads_of_one_process_share_one_look(make, asked):
    """A token at hand costs neither Redis nor a lock."""
    tokens = make()
    assert tokens.at_hand() is None
    barrier = threading.Barrier(16)

    def ask(_):
        barrier.wait()
        return tokens.get()

    with ThreadPoolExecutor(16) as pool:
        got = set(pool.map(ask, range(16)))
    assert got == {tokens.at_hand()}
    assert asked() == 1
