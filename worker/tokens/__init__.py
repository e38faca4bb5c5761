"""The one bearer token of all processes: memory first, Redis second, one fetch for all.

Our own record in Redis decides when a token is fetched and how long a refusal is believed;
MSAL only speaks the protocol, and its caches are emptied before each fetch.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis import Redis, RedisError

from worker.credentials import Credential
from worker.model import PostroomError
from worker.tokens.entra import PASSING, REFUSED, Entra, FetchError

log = logging.getLogger(__name__)

#: Who fetches has so long; then another may. Longer than a fetch: one request to Entra.
LOCK = timedelta(seconds=60)
POLL = 0.05  # seconds between two looks while another worker fetches
#: While another worker renews a token that is still good, look again after this (seconds).
LOOK_AGAIN = 1.0
#: A token that Graph refuses so soon after its birth was not revoked: it never worked.
FRESH = timedelta(seconds=60)

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

_SCRIPT = Path(__file__).with_name("tokens.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token; `ends_at` is an instant of this process's `time.monotonic()`."""

    value: str = field(repr=False)
    ends_at: float
    serial: int  #: names the token towards `Tokens.reject`

    @property
    def left(self) -> timedelta:
        """How much longer it is good; negative once it has ended."""
        return timedelta(seconds=self.ends_at - time.monotonic())


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no worker has a token, and since when."""

    code: str
    detail: str
    since: datetime
    ours: bool  #: the credential is the one that this process has; False: another's


class TokenRefused(PostroomError):
    """No token is to be had: `code` and `detail` say why, the next one is tried after `wait`."""

    def __init__(self, code: str, detail: str, wait: timedelta) -> None:
        self.code = code
        self.detail = detail
        self.wait = wait
        super().__init__(f"no token: {code}: {detail}" if detail else f"no token: {code}")


@dataclass(frozen=True, slots=True)
class _Held:
    token: Token
    look_at: float  # monotonic: until then nothing needs asking


@dataclass(frozen=True, slots=True)
class _Look:
    """What the script's `look` answers; times in Redis's milliseconds."""

    now: int
    new_serial: bytes
    mine: int
    blob: bytes
    serial: bytes
    ends: int
    renew: int
    until: int
    code: bytes
    detail: bytes


class Tokens:
    """The door to the shared token. Safe for threads; make one per process, after a fork.

    `redis` answers in bytes (no decode_responses). Where Redis does not answer, `get` goes on
    with a token in memory that is still good, else raises redis.RedisError.
    """

    def __init__(  # noqa: PLR0913  # all by name, and each is a setting
        self,
        redis: Redis,
        *,
        authority: str,
        tenant_id: str,
        client_id: str,
        credential: Credential | Callable[[], Credential],
        scope: str,
        ca_bundle: str | None,
        margin: timedelta,
        secret_keys: Sequence[str] = (),
        fetching: Callable[[], None] = lambda: None,
    ) -> None:
        """`credential`: see worker.credentials; or what gives it anew, as often as one is needed:
        a changed file is taken up without a restart. What that raises here passes through.

        `secret_keys`: Fernet keys; the first encrypts, all decrypt. Raises ValueError where one
        is malformed. `fetching` hears of each request to Entra.
        """
        self._source = credential if callable(credential) else lambda: credential
        self._place = (authority, tenant_id, client_id, scope, ca_bundle)
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self._margin = margin
        self._fetching = fetching
        self._fernet = _made_of(secret_keys) if secret_keys else None
        stem = f"postroom:token:{{{tenant_id}:{client_id}}}:{_digest(authority, scope)}"
        # A refusal holds for one credential: a corrected one is tried at once. 32 bits tell two
        # secrets apart and do not help to guess one.
        self._keys = [stem, f"{stem}:trouble:", f"{stem}:lock", f"{stem}:refused"]
        self._proof = ""
        self._entra = self._take_up(self._source())
        self._held: _Held | None = None
        self._mutex = threading.Lock()

    def at_hand(self) -> Token | None:
        """The token, if that needs no waiting at all; None: call `get` in a thread."""
        held = self._held
        return held.token if held is not None and time.monotonic() < held.look_at else None

    def get(self) -> Token:
        """A token that is good now. May wait for Redis and Entra: call it in a thread.

        Raises TokenRefused, and redis.RedisError (see the class).
        """
        if (token := self.at_hand()) is not None:
            return token
        old = self._still_good()
        if not self._mutex.acquire(blocking=old is None):
            assert old is not None  # noqa: S101  # told to mypy: only then we did not wait
            return old
        try:
            return self.at_hand() or self._shared()
        except RedisError:
            old = self._still_good()
            if old is None:
                raise
            return self._hold(old, time.monotonic() + LOOK_AGAIN)
        finally:
            self._mutex.release()

    def fresh(self) -> Token:
        """A token straight from Entra, past all memories and kept nowhere: for diagnosis.

        Raises TokenRefused.
        """
        began = time.monotonic()
        with self._mutex:
            self._refresh()
            try:
                value, life = self._entra.fetch()
            except FetchError as failed:
                raise TokenRefused(failed.code, failed.detail, failed.waits[0]) from None
        return Token(value, began + life.total_seconds(), 0)

    def reject(self, serial: int, code: str) -> None:
        """Graph answered 401 to this token: it is forgotten, once for all who say so.

        A second token refused within a minute of its birth counts as a refused credential.
        Raises redis.RedisError.
        """
        held = self._held
        if held is not None and held.token.serial == serial:
            self._held = None
        self._call("reject", serial, code, _ms(FRESH), *map(_ms, REFUSED))

    def refusal(self) -> Refusal | None:
        """What keeps all lanes from sending; None where a token is there, or nobody was refused.

        Also what another process was told, whose credential may be an older one. Asks Redis alone.
        Raises redis.RedisError.
        """
        token, trouble, _, last = self._keys
        whose: Any = self._redis.get(last)
        if whose is None or self._redis.exists(token):
            return None
        found: list[Any] = self._redis.hmget(whose, ["code", "detail", "since"])
        code, detail, since = found
        if code is None or since is None:
            return None
        return Refusal(
            code.decode(), (detail or b"").decode(), _instant(since), whose.decode() == trouble
        )

    def shared_until(self) -> datetime | None:
        """When the token in Redis ends, with which the workers go on; None: there is none.

        Raises redis.RedisError.
        """
        ends: Any = self._redis.hget(self._keys[0], "ends")
        return _instant(ends) if ends else None

    def close(self) -> None:
        """Closes the connections to Entra."""
        self._entra.close()

    def _take_up(self, credential: Credential) -> Entra:
        """What asks Entra with this credential; a new one starts without the old one's trouble."""
        if (proof := _digest(repr(credential))) != self._proof:
            if self._proof:
                self._entra.close()
            self._proof, self._entra = proof, Entra(credential, *self._place)
            self._keys[1] = f"{self._keys[0]}:trouble:{proof}"
        return self._entra

    def _refresh(self) -> None:
        """Takes up a changed credential. One that cannot be read just now leaves the old one."""
        with suppress(PostroomError):
            self._take_up(self._source())

    def _still_good(self) -> Token | None:
        held = self._held
        return held.token if held is not None and time.monotonic() < held.token.ends_at else None

    def _hold(self, token: Token, look_at: float) -> Token:
        self._held = _Held(token, min(look_at, token.ends_at))
        return token

    def _shared(self) -> Token:
        """The token in Redis; fetches it where that falls to us, waits where another does."""
        self._refresh()
        fetcher = secrets.token_hex(16)
        give_up = time.monotonic() + LOCK.total_seconds() * 1.5
        unusable = b""
        while True:
            began = time.monotonic()
            look = _Look(*self._call("look", fetcher, _ms(LOCK), unusable))
            token = self._opened(look, began)
            if look.mine:
                return self._renew(fetcher, look, began, token)
            if look.blob and token is None:
                unusable = look.serial  # not by our keys: as good as absent
                continue
            if token is not None:
                # The end counts from before the call, what is due from after it: neither is
                # taken for true before it is so in Redis's time.
                due_in = (look.renew - look.now) / 1000
                again = max((look.until - look.now) / 1000, LOOK_AGAIN)
                return self._hold(token, time.monotonic() + (due_in if due_in > 0 else again))
            if look.until > look.now:
                raise TokenRefused(
                    look.code.decode(),
                    look.detail.decode(),
                    timedelta(milliseconds=look.until - look.now),
                )
            if began > give_up:
                raise TokenRefused("TokenAwaited", "another worker fetches it", PASSING[1])
            time.sleep(POLL)

    def _opened(self, look: _Look, began: float) -> Token | None:
        """The token of the record; None where there is none, or not one that our keys open."""
        if not look.blob:
            return None
        value = look.blob
        if self._fernet is not None:
            from cryptography.fernet import InvalidToken

            try:
                value = self._fernet.decrypt(look.blob)
            except InvalidToken:
                return None
        ends_at = began + (look.ends - look.now) / 1000
        return Token(value.decode(), ends_at, int(look.serial))

    def _renew(self, fetcher: str, look: _Look, began: float, old: Token | None) -> Token:
        """Fetches a token under the lock; a failure goes on with an old one that is still good."""
        looked = time.monotonic()
        self._fetching()
        try:
            value, life = self._entra.fetch()
        except FetchError as failed:
            wait_ms = self._call(
                "refuse", fetcher, failed.code, failed.detail, *map(_ms, failed.waits)
            )
            wait = timedelta(milliseconds=wait_ms)
            log.warning("no token: %s; the next try comes in %d s", failed.code,
                        wait.total_seconds())  # fmt: skip
            if old is not None and old.left > timedelta(0):
                return self._hold(old, time.monotonic() + wait.total_seconds())
            raise TokenRefused(failed.code, failed.detail, wait) from None
        after = life - self._margin if life > self._margin else life / 2
        blob = self._fernet.encrypt(value.encode()) if self._fernet else value.encode()
        token = Token(value, began + life.total_seconds(), int(look.new_serial))
        times = (look.now, look.now + _ms(life), look.now + _ms(after))
        self._hold(token, looked + after.total_seconds())
        # Not kept where we took longer than the lock: another's token is there by now, ours is
        # good as well.
        self._call("keep", fetcher, blob, token.serial, *times)
        return token

    def _call(self, *args: Any) -> Any:
        return self._script(keys=self._keys, args=args)


def _made_of(keys: Sequence[str]) -> MultiFernet:
    # Imported here: it is large, and most workers are told of no key.
    from cryptography.fernet import Fernet, MultiFernet

    return MultiFernet([Fernet(key) for key in keys])


def _ms(span: timedelta) -> int:
    return int(span.total_seconds() * 1000)


def _instant(ms: bytes) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
