"""The protocol of one message, small enough to walk through every interleaving of it.

Two workers, a Graph that may answer late or never, leases and tokens that end, pauses of any
length, crashes, looks and a cancel. The rules are the product's own: `model.TRANSITIONS` says
which steps are legal, `policy.conclude` what an answer comes to. The rest is what SQL, the gate
and Graph do, in a few lines each.

What is taken for granted, as the design does: Graph refuses a token that has ended; it is done
with a request by the time its token is `settled` (its end, SETTLE_MARGIN and the request timeout);
a look after that finds every copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple

from worker.model import (
    TRANSITIONS,
    Accepted,
    Answer,
    Blame,
    Blocked,
    NotSent,
    OnUnknown,
    Outcome,
    Rejected,
    State,
    Throttled,
    Unknown,
    Verdict,
)
from worker.policy import LEASE_NEARLY_OVER, conclude

MAX_ATTEMPTS = 3
NOT_SENT = {State.FAILED, State.CANCELLED, State.EXPIRED, State.SUPPRESSED}

#: What a worker may hear, by name.
WORDS: Mapping[str, Outcome] = {
    "accepted": Accepted(Answer(status=202)),
    "throttled": Throttled(Answer(status=429)),
    "rejected": Rejected(Answer(status=400)),
    "not sent": NotSent(Answer(code=LEASE_NEARLY_OVER)),
    "token refused": Blocked(Answer(status=401), Blame.TOKEN),
    "doubt": Unknown(Answer(status=504)),
}


class Bug(Enum):
    """Mistakes that the exploration must find: each is one of those that others have made."""

    NO_FENCE = "a zombie's word is recorded as if the claim were still its own"
    RESEND_ON_504 = "an answer in doubt is taken for a refusal"
    NO_SETTLE = "a look that finds nothing is believed at once"
    PERMIT_LEAK = "the slot of a worker that died is never given back"
    RETRY_AFTER_IGNORED = "a mailbox that was told to rest is called"
    UPDATE_THEN_POST = "the row says sent before the request is made"
    LEASE_MEANS_NOT_SENT = "a claim whose lease ran out is queued again, as if nothing had left"
    DOUBT_FORGOTTEN = "a refusal after a doubt ends as failed"
    LATE_WORD_LOST = "a 202 that comes after its claim was given up is dropped"


class Worker(NamedTuple):
    """One process, as far as this message goes. A process that pauses simply takes no step."""

    at: str = "idle"  # claimed, ready (its guard has passed), waiting, heard
    fence: int = 0
    token: int = 0
    tries: int = 0
    doubt: bool = False
    word: str = ""


IDLE = Worker()


class World(NamedTuple):
    """Everything that matters. Tokens are numbers: those below `ended` have ended, those below
    `settled` are so long gone that nothing sent with them can come any more.
    """

    state: State = State.QUEUED
    doubt: bool = False
    fence: int = 0
    tries: int = 0
    token: int = 0  # that of the last claim
    lease_over: bool = False
    cancelled: bool = False
    workers: tuple[Worker, Worker] = (IDLE, IDLE)
    permit: int = 0  # the fence that holds the slot
    pending: tuple[tuple[int, int], ...] = ()  # (fence, token) of requests that Graph has
    copies: tuple[int, ...] = ()  # fences of what Graph accepted
    ended: int = 0
    settled: int = 0
    cool: bool = False
    early: bool = False  # someone called although the mailbox was to rest
    crashes: int = 0
    doubts: int = 0
    refusals: int = 0
    told: bool = False  # a worker has recorded a 202


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of each may happen, so that the walk ends."""

    claims: int = 3
    crashes: int = 1
    doubts: int = 1
    refusals: int = 1
    token_ends: int = 2
    cancels: bool = True


@dataclass(frozen=True, slots=True)
class Rules:
    """One protocol: the policy, perhaps with a bug in it."""

    policy: OnUnknown
    bug: Bug | None = None
    bounds: Bounds = Bounds()


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk found: how many worlds, how they may end, and the first broken promise."""

    worlds: int
    ends: frozenset[tuple[int, State]]  #: (copies, state) of worlds in which nothing moves
    problem: str | None = None
    path: tuple[str, ...] = ()  #: the steps that lead to it


def explore(rules: Rules) -> Walk:
    """Every world that can be reached, nearest first; ends at the first broken promise."""
    start = World()
    came: dict[World, tuple[World, str] | None] = {start: None}
    queue = deque([start])
    ends: set[tuple[int, State]] = set()
    while queue:
        world = queue.popleft()
        following = list(steps(world, rules))
        problem = broken(world, rules) or (None if following else stuck(world, rules))
        if problem:
            return Walk(len(came), frozenset(ends), problem, _path(came, world))
        if not following:
            ends.add((len(world.copies), world.state))
        for name, then in following:
            if then.state is not world.state and then.state not in TRANSITIONS[world.state]:
                path = (*_path(came, world), name)
                return Walk(len(came), frozenset(ends), f"{world.state} → {then.state}", path)
            if then not in came:
                came[then] = (world, name)
                queue.append(then)
    return Walk(len(came), frozenset(ends))


def _path(came: Mapping[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    names: list[str] = []
    while (before := came[world]) is not None:
        world, name = before
        names.append(name)
    return tuple(reversed(names))


# ---- promises -----------------------------------------------------------------------------------


def broken(w: World, rules: Rules) -> str | None:
    """The promise that this world breaks."""
    twice = len(w.copies) > 1 and rules.policy is not OnUnknown.RESEND
    promises = {
        "sent twice": not twice,
        "sent, and Graph has accepted nothing": w.state is not State.SENT or bool(w.copies),
        f"{w.state}, and Graph has accepted it": w.state not in NOT_SENT or not w.copies,
        f"{w.state}, and a 202 was recorded": w.state is State.SENT or not w.told,
        "unknown without doubt": w.state is not State.UNKNOWN or w.doubt,
        f"{w.state} in spite of doubt": w.state not in NOT_SENT or not w.doubt,
        "called too early": not w.early,
    }
    return next((name for name, kept in promises.items() if not kept), None)


def stuck(w: World, rules: Rules) -> str | None:
    """Nothing can move any more, and the message is not at rest, though claims are left."""
    if w.state in {State.QUEUED, State.SENDING} and w.fence < rules.bounds.claims:
        return f"{w.state} for ever"
    if rules.policy is OnUnknown.RECONCILE and w.state is State.UNKNOWN and w.token < w.settled:
        return "in doubt for ever"
    return None


# ---- steps --------------------------------------------------------------------------------------


def steps(w: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Everything that may happen next."""
    for n, worker in enumerate(w.workers):
        if n and worker == w.workers[0]:
            continue  # the same steps of the same worker
        yield from _worker_steps(w, n, worker, rules)
    yield from _graph_steps(w, rules)
    yield from _time_steps(w, rules)
    yield from _chore_steps(w, rules)


def _worker_steps(w: World, n: int, me: Worker, rules: Rules) -> Iterator[tuple[str, World]]:
    yield from STEPS[me.at](w, n, me, rules)
    if me.at != "idle" and w.crashes < rules.bounds.crashes:
        yield "crash", _with(w._replace(crashes=w.crashes + 1), n, IDLE)


def _idle(w: World, n: int, _me: Worker, rules: Rules) -> Iterator[tuple[str, World]]:
    if _may_claim(w, rules):
        yield "claim", _claim(w, n, rules)


def _claimed(w: World, n: int, me: Worker, _rules: Rules) -> Iterator[tuple[str, World]]:
    """The guard knows the worker's own clock, and no more."""
    yield "the guard passes", _with(w, n, me._replace(at="ready"))
    if w.lease_over or w.fence != me.fence:
        yield "the guard refuses", _hears(w, n, "not sent")


def _ready(w: World, n: int, me: Worker, _rules: Rules) -> Iterator[tuple[str, World]]:
    yield "the request leaves", _leave(w, n, me)


def _waiting(w: World, n: int, me: Worker, rules: Rules) -> Iterator[tuple[str, World]]:
    if me.fence in w.copies:
        yield "202", _hears(w, n, "accepted")
    if w.doubts < rules.bounds.doubts:
        yield "no answer", _hears(w._replace(doubts=w.doubts + 1), n, "doubt")


def _heard(w: World, n: int, me: Worker, rules: Rules) -> Iterator[tuple[str, World]]:
    yield f"record {me.word}", _record(w, n, me, rules)


STEPS: Mapping[str, Callable[[World, int, Worker, Rules], Iterator[tuple[str, World]]]] = {
    "idle": _idle,
    "claimed": _claimed,
    "ready": _ready,
    "waiting": _waiting,
    "heard": _heard,
}


def _may_claim(w: World, rules: Rules) -> bool:
    rests = w.cool and rules.bug is not Bug.RETRY_AFTER_IGNORED
    free = not w.permit and not rests and not w.cancelled
    return w.state is State.QUEUED and free and w.fence < rules.bounds.claims


def _claim(w: World, n: int, rules: Rules) -> World:
    fence = w.fence + 1
    at_once = rules.bug is Bug.UPDATE_THEN_POST
    claimed = w._replace(
        state=State.SENDING, fence=fence, token=w.ended, lease_over=False, permit=fence,
        early=w.early or w.cool,
    )  # fmt: skip
    me = Worker("claimed", fence, w.ended, w.tries, w.doubt)
    claimed = _with(claimed, n, me)
    return _move(claimed, State.SENT, doubt=False) if at_once else claimed


def _leave(w: World, n: int, me: Worker) -> World:
    """Graph looks at the token when the request arrives."""
    if me.token < w.ended:
        return _hears(w, n, "token refused")
    pending = tuple(sorted((*w.pending, (me.fence, me.token))))
    return _with(w._replace(pending=pending), n, me._replace(at="waiting"))


def _hears(w: World, n: int, word: str) -> World:
    cool = w.cool or word == "throttled"  # told to all before anything is recorded
    return _with(w._replace(cool=cool), n, w.workers[n]._replace(at="heard", word=word))


def _record(w: World, n: int, me: Worker, rules: Rules) -> World:
    """As `store.sending.record`: guarded by the fence; later, evidence may only rise."""
    verdict = _verdict(me.word, me.tries, me.doubt, rules)
    free = w._replace(permit=0 if w.permit == me.fence else w.permit)
    free = _with(free._replace(told=w.told or me.word == "accepted"), n, IDLE)
    ours = w.state is State.SENDING and w.fence == me.fence
    if not ours and rules.bug is Bug.NO_FENCE:
        ours = w.state is State.SENDING
    if ours:
        doubt = (w.doubt or verdict.doubt) and verdict.state is not State.SENT
        if rules.bug is Bug.DOUBT_FORGOTTEN and verdict.state is State.FAILED:
            doubt = False
        return _move(free, verdict.state, doubt=doubt, tries=w.tries + verdict.spends_try)
    late = verdict.state is State.SENT and rules.bug is not Bug.LATE_WORD_LOST
    return _move(free, State.SENT, doubt=False) if late else free


@cache
def _verdict(word: str, tries: int, doubt: bool, rules: Rules) -> Verdict:
    if rules.bug is Bug.RESEND_ON_504 and word == "doubt":
        word = "throttled"
    if rules.bug is Bug.DOUBT_FORGOTTEN:
        doubt = False
    return conclude(
        WORDS[word], tries=tries, doubt=doubt, max_attempts=MAX_ATTEMPTS,
        on_unknown=rules.policy, jitter=0.5,
    )  # fmt: skip


def _move(w: World, wanted: State, *, doubt: bool, tries: int | None = None) -> World:
    """The next state, but for what SQL alone knows: what is in doubt ends as neither failed nor
    cancelled, and what returns to the queue of a cancelled batch ends there.
    """
    if wanted is State.QUEUED and w.cancelled:
        wanted = State.CANCELLED
    if doubt and wanted in NOT_SENT:
        wanted = State.UNKNOWN
    return w._replace(state=wanted, doubt=doubt, tries=w.tries if tries is None else tries)


def _graph_steps(w: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """A request that has arrived is accepted, refused, or forgotten, whenever Graph likes."""
    for request in w.pending:
        left = tuple(one for one in w.pending if one != request)
        gone = w._replace(pending=left)
        yield "Graph accepts", gone._replace(copies=tuple(sorted((*w.copies, request[0]))))
        if w.refusals < rules.bounds.refusals:
            refused = gone._replace(refusals=w.refusals + 1)
            for n, worker in enumerate(w.workers):
                if worker.at == "waiting" and worker.fence == request[0]:
                    yield "429", _hears(refused, n, "throttled")
                    yield "400", _hears(refused, n, "rejected")
        if not any(x.at == "waiting" and x.fence == request[0] for x in w.workers):
            yield "Graph forgets", gone


def _time_steps(w: World, rules: Rules) -> Iterator[tuple[str, World]]:
    if w.state is State.SENDING and not w.lease_over:
        yield "the lease ends", w._replace(lease_over=True)
    if w.ended < rules.bounds.token_ends:
        yield "the token ends", w._replace(ended=w.ended + 1)
    if w.settled < w.ended and all(token > w.settled for _, token in w.pending):
        yield "the token is settled", w._replace(settled=w.settled + 1)
    if w.cool:
        yield "the mailbox has rested", w._replace(cool=False)
    if w.permit and (
        rules.bug is not Bug.PERMIT_LEAK or any(x.fence == w.permit for x in w.workers)
    ):
        # Its holder died, or pauses so long that the lane is another's.
        yield "the slot lapses", w._replace(permit=0)


def _chore_steps(w: World, rules: Rules) -> Iterator[tuple[str, World]]:
    if w.state is State.SENDING and w.lease_over:
        yield "sweep", _sweep(w, rules)
    if w.state is State.UNKNOWN:
        yield from _look(w, rules)
    if rules.bounds.cancels and not w.cancelled:
        cancelled = w._replace(cancelled=True)
        if w.state is State.QUEUED:
            yield "cancel", _move(cancelled, State.CANCELLED, doubt=w.doubt)
        elif w.state is State.SENDING:
            yield "cancel", cancelled


def _sweep(w: World, rules: Rules) -> World:
    if rules.bug is Bug.LEASE_MEANS_NOT_SENT:
        return _move(w, State.QUEUED, doubt=w.doubt)
    resend = rules.policy is OnUnknown.RESEND and w.tries + 1 < MAX_ATTEMPTS
    then = State.QUEUED if resend and not w.cancelled else State.UNKNOWN
    return _move(w, then, doubt=True, tries=w.tries + 1)


def _look(w: World, rules: Rules) -> Iterator[tuple[str, World]]:
    if w.copies:
        yield "a look finds it", _move(w, State.SENT, doubt=False)
    if rules.policy is not OnUnknown.RECONCILE:
        return
    over = w.token < w.settled
    if (over and not w.copies) or (not over and rules.bug is Bug.NO_SETTLE):
        spent = w.tries >= MAX_ATTEMPTS and not w.cancelled
        then = State.FAILED if spent else State.QUEUED
        yield "a look finds nothing", _move(w, then, doubt=False)


def _with(w: World, n: int, worker: Worker) -> World:
    """The worker changed; the two are alike, so their order is always the same."""
    pair = (worker, w.workers[1]) if n == 0 else (w.workers[0], worker)
    return w._replace(workers=tuple(sorted(pair)))  # type: ignore[arg-type]


# ---- the way in ---------------------------------------------------------------------------------


class WayInBug(Enum):
    """Mistakes on the way from `enqueue` to a row."""

    ACK_BEFORE_COMMIT = "the inbox is acknowledged before the rows are committed"
    CELERY_PAYLOAD = "the message is taken out of Redis when a worker gets it"
    NO_KEY = "a chunk that is read twice is written twice"


class WayIn(NamedTuple):
    """One chunk: whether it is in the inbox, how many rows it has become, and its two readers."""

    inbox: bool = True
    rows: int = 0
    readers: tuple[str, str] = ("idle", "idle")  # read, committed, acknowledged
    crashes: int = 0


def explore_way_in(bug: WayInBug | None, crashes: int = 2) -> str | None:
    """The first broken promise of an acknowledged call, over all interleavings; None if none is."""
    seen, queue = {WayIn()}, deque([WayIn()])
    while queue:
        w = queue.popleft()
        idle = all(reader == "idle" for reader in w.readers)
        if w.rows > 1:
            return "doubled"
        if not w.inbox and not w.rows and idle:
            return "lost"
        for then in _way_in_steps(w, bug, crashes):
            if then not in seen:
                seen.add(then)
                queue.append(then)
    return None


def _way_in_steps(w: WayIn, bug: WayInBug | None, crashes: int) -> Iterator[WayIn]:
    for n, reader in enumerate(w.readers):
        then = _reads_on(w, reader, bug)
        if then is not None:
            at, changed = then
            yield _reader(changed, n, at)
        if reader != "idle" and w.crashes < crashes:
            yield _reader(w._replace(crashes=w.crashes + 1), n, "idle")


def _reads_on(w: WayIn, reader: str, bug: WayInBug | None) -> tuple[str, WayIn] | None:
    """What a reader does next: where it is then, and what it changed."""
    written = w._replace(rows=w.rows + 1 if bug is WayInBug.NO_KEY else 1)
    match reader, bug:
        case "idle", _:  # reads also what another reader was silent about for a while
            gone = bug is WayInBug.CELERY_PAYLOAD
            return ("read", w._replace(inbox=not gone)) if w.inbox else None
        case "read", WayInBug.ACK_BEFORE_COMMIT:
            return "acknowledged", w._replace(inbox=False)
        case "read", _:
            return "committed", written
        case "committed", _:
            return "idle", w._replace(inbox=False)
        case _:
            return "idle", written


def _reader(w: WayIn, n: int, at: str) -> WayIn:
    return w._replace(readers=(at, w.readers[1]) if n == 0 else (w.readers[0], at))
