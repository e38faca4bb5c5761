"""The arithmetic of limits, and its twin in Redis: the same answers to the same history."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from tests.doors_kit import nothing
from worker.gate import GRANTED, Back, Gate, keys_of
from worker.limits import Book, Cost, Limit, Limits, Rate, Used, Window, outside, share

MAILBOX = "notices@contoso.com"
START = 1_790_000_000_000
LIFE = timedelta(seconds=30)


# ---- rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "seconds"),
    [
        ("10000/10min", 10_000, 600),
        ("30/min", 30, 60),
        ("150MB/5min", 150_000_000, 300),
        (" 9500 / 24h ", 9500, 86_400),
        ("300/10s", 300, 10),
    ],
)
def test_a_rate_is_read_as_people_write_it(text: str, amount: int, seconds: int) -> None:
    """So much, a slash, and a time in s, min or h."""
    assert Rate.parse(text) == Rate(amount, timedelta(seconds=seconds))


def test_a_rate_is_written_so_that_it_reads_the_same() -> None:
    """What `mailbox list` shows can be given to `mailbox set`."""
    for text in ("10000/10min", "30/1min", "9500/24h", "300/10s"):
        assert str(Rate.parse(text)) == text
    assert Rate.parse("OFF") is None


@pytest.mark.parametrize(
    "text", ["", "0/min", "10", "10/0s", "10/week", "-1/s", "1.5/s", "10/800h", "9999999999999/s"]
)
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    """One line says what is allowed."""
    with pytest.raises(ValueError, match=r"rate") as caught:
        Rate.parse(text)
    assert "\n" not in str(caught.value)


def test_what_differs_for_a_mailbox_wins() -> None:
    """An override names a limit, and `off` is one too."""
    changed = Limits(requests=Rate.parse("10/s")).changed(
        {"slots": 2, "requests": "off", "recipients": "5/min", "nonsense": 1}
    )
    assert (changed.slots, changed.requests) == (2, None)
    assert changed.recipients == Rate(5, timedelta(minutes=1))


def test_the_share_for_high_is_rounded_so_that_a_small_limit_still_lets_through() -> None:
    """5 % of 1 is nothing: a limit of one a second must not become none."""
    assert [share(n, 5) for n in (1, 19, 20, 100)] == [1, 19, 19, 95]


def test_outside_counts_by_domain_whatever_its_case() -> None:
    """An address inside is one whose domain is."""
    assert outside(["a@Contoso.com", "b@fabrikam.com", "c@x.contoso.com"], INTERNAL) == 2


INTERNAL = frozenset({"contoso.com"})

# ---- windows ------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 5)), max_size=400),
    span=st.integers(100, 5000),
)
def test_a_window_never_counts_less_than_it_holds_and_stays_small(
    steps: list[tuple[int, int]], span: int
) -> None:
    """Whatever is merged counts for longer, by less than a hundredth of the span."""
    window, now, all_of_it = Window(span), 0, []
    for pause, amount in steps:
        now += pause
        window.forget(now)
        window.add(now, amount)
        all_of_it.append((now, amount))
        exact = sum(n for at, n in all_of_it if at + span >= now)
        loose = sum(n for at, n in all_of_it if at + span + span / 100 >= now)
        assert exact <= window.total <= loose
        assert window.total == sum(n for *_, n in window.entries)
        assert len(window.entries) <= 102


# ---- the twin -----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Milliseconds, as the test says."""

    now: int = START

    def __call__(self) -> int:
        return self.now


@dataclass(frozen=True)
class Ask:
    costs: tuple[Cost, ...]
    high: bool


@dataclass(frozen=True)
class GiveBack:
    which: int
    age: int
    used: Used


@dataclass(frozen=True)
class Wait:
    ms: int


costs = st.builds(
    Cost, st.just(1), st.integers(0, 1), st.integers(0, 9), st.integers(0, 400), st.integers(0, 3)
)
steps = st.one_of(
    st.builds(Ask, st.lists(costs, max_size=5).map(tuple), st.booleans()),
    st.builds(GiveBack, st.integers(0, 3), st.integers(0, 50), st.sampled_from(Used)),
    st.builds(Wait, st.one_of(st.integers(0, 60), st.integers(500, 40_000))),
)
rates = st.one_of(
    st.none(),
    st.builds(Rate, st.integers(1, 40), st.integers(1, 20).map(lambda s: timedelta(seconds=s))),
)
all_limits = st.builds(
    Limits, st.integers(1, 4), rates, rates, rates, rates, rates, st.integers(0, 50)
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(limits=all_limits, history=st.lists(steps, max_size=60))
def test_the_gate_in_redis_answers_as_its_twin_does(
    redis_url: str, limits: Limits, history: list[Ask | GiveBack | Wait]
) -> None:
    """Grants, waits, the limit that binds and the books afterwards, step by step."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    asyncio.run(_compare(redis_url, limits, history))


async def _compare(url: str, limits: Limits, history: list[Ask | GiveBack | Wait]) -> None:
    clock, book, names = Clock(), Book(limits), count()
    async with Redis.from_url(url) as client:
        gate = Gate(client, limits, history=nothing, lease=LIFE, clock=clock)
        for step in history:
            match step:
                case Wait(ms):
                    clock.now += ms
                case GiveBack(which, age, used):
                    await _give_back(gate, book, clock, (which, age, used))
                case Ask(wanted, high):
                    named = [(str(next(names)), cost) for cost in wanted]
                    await _ask_both(gate, book, clock, named, high=high)
        usage = await gate.usage(MAILBOX)
        book.settle(clock.now)
        assert usage.used == {w: book.used(w) for w in book.windows}
        assert await client.hlen(keys_of(MAILBOX)[1]) == len(book.slots)


async def _give_back(gate: Gate, book: Book, clock: Clock, step: tuple[int, int, Used]) -> None:
    which, age, used = step
    if names := sorted(book.slots):
        name = names[which % len(names)]
        back = Back(name, timedelta(milliseconds=age), used)
        await gate.ask(MAILBOX, "lane", given_back=[back])
        book.give_back(clock.now, name, age=age, used=used)
        renew(book, clock.now)
        book.settle(clock.now)


async def _ask_both(
    gate: Gate, book: Book, clock: Clock, wanted: list[tuple[str, Cost]], *, high: bool
) -> None:
    until = renew(book, clock.now)
    grant = await gate.ask(MAILBOX, "lane", wanted=wanted, high=high)
    leave = book.ask(clock.now, wanted, until=until, high=high)
    wait = None if grant.wait is None else grant.wait // timedelta(milliseconds=1)
    said = (grant.count, None if grant.word == GRANTED else grant.word, wait)
    assert said == (leave.count, leave.binds, leave.wait)


def renew(book: Book, now: int) -> int:
    """The lane's own slots live as long as its lease."""
    until = now + LIFE // timedelta(milliseconds=1)
    for name, slot in list(book.slots.items()):
        book.slots[name] = replace(slot, until=until)
    return until


# ---- what Graph would see -----------------------------------------------------------------------


@dataclass
class Graph:
    """Requests as they arrive: some time after the grant, and some time before the answer."""

    arrived: list[tuple[int, int]] = field(default_factory=list)

    def most_in(self, span: int) -> int:
        """The most that any window of this length holds, its ends included."""
        return max(
            (sum(n for at, n in self.arrived if start <= at <= start + span)
             for start, _ in self.arrived), default=0,
        )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    delays=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=40, max_size=120),
    amount=st.integers(1, 12), span=st.integers(1, 5), parallel=st.integers(1, 4),
)  # fmt: skip
def test_no_window_of_graphs_ever_holds_more_than_the_limit(
    delays: list[tuple[int, int]], amount: int, span: int, parallel: int
) -> None:
    """However long requests take to arrive and answers to come back; each wait is kept exactly."""
    rate = Rate(amount, timedelta(seconds=span))
    book, graph = Book(Limits(slots=parallel, requests=rate, reserve_high=0)), Graph()
    now, landing = 0, dict[str, int]()
    for number, (there, back) in enumerate(delays):
        while not (leave := book.ask(now, [(str(number), Cost())], until=now + 9999,
                                     high=False)).count:  # fmt: skip
            now = min([now + (leave.wait or 1), *landing.values()])
            for name in [n for n, at in landing.items() if at <= now]:
                book.give_back(now, name, age=now - landing.pop(name), used=Used.REQUEST)
        graph.arrived.append((now + there, 1))
        landing[str(number)] = now + there + back
    assert graph.most_in(rate.span_ms) <= amount


def test_a_full_window_opens_to_the_millisecond() -> None:
    """What ended at 0 in a window of 10 s lets the next one through at 10,001 ms, not before."""
    book = Book(Limits(requests=Rate.parse("1/10s")))
    assert book.ask(0, [("a", Cost())], until=99_999, high=False).count == 1
    book.give_back(0, "a", age=0, used=Used.REQUEST)
    for now, granted in ((1, 0), (10_000, 0), (10_001, 1)):
        leave = book.ask(now, [("b", Cost())], until=99_999, high=False)
        assert leave.count == granted
        assert granted or (leave.binds, now + (leave.wait or 0)) == (Limit.REQUESTS, 10_001)


def test_what_is_larger_than_its_limit_is_told_so() -> None:
    """It would wait for ever, and keep back all others behind it."""
    leave = Book(Limits(recipients=Rate.parse("10/h"))).ask(
        0, [("a", Cost(1, 1, 11))], until=9, high=True
    )
    assert (leave.count, leave.binds, leave.wait) == (0, Limit.RECIPIENTS, None)


def test_what_is_larger_than_its_share_goes_alone() -> None:
    """Five in a hundred are kept for high: a mail to 98 must not wait for ever."""
    book = Book(Limits(recipients=Rate.parse("100/h"), reserve_high=5))
    assert book.ask(0, [("a", Cost(1, 1, 98))], until=9, high=False).count == 1
    assert book.ask(1, [("b", Cost(1, 1, 1))], until=9, high=False).count == 0


@pytest.mark.parametrize("text", ["10000/10min", "300/10s", "9500/24h", "1000000/744h"])
def test_the_books_of_a_mailbox_stay_below_20_kb(redis_url: str, text: str) -> None:
    """Whatever the limit: a day of steady work in every window at once."""

    async def run() -> int:
        rate, clock = Rate.parse(text), Clock()
        assert rate
        limits = Limits(4, rate, rate, rate, Rate(10**12, rate.span), None)
        async with Redis.from_url(redis_url) as client:
            gate = Gate(client, limits, history=nothing, lease=LIFE, clock=clock)
            free: list[Back] = []
            for number in range(500):
                wanted = [(f"{number:036}-{i}", Cost(1, 1, 1, 123_456)) for i in range(4)]
                grant = await gate.ask(MAILBOX, "lane", wanted=wanted, given_back=free)
                assert grant.word == GRANTED
                free = [Back(name, timedelta(0), Used.ALL) for name, _ in wanted]
                clock.now += max(rate.span_ms // 200, 5 * rate.span_ms // rate.amount)
            sizes = [await client.memory_usage(key) or 0 for key in keys_of(MAILBOX)]
            return sum(sizes)

    assert asyncio.run(run()) < 20_000
