"""Clean stops: whatever way a worker is asked to end, nothing is left in doubt."""

from __future__ import annotations

import signal
from collections import Counter
from functools import partial

import pytest

from tests.support import wait_until
from tests.test_spine import POSTGRESQL, Service, service, simulator_options

__all__ = ["service", "simulator_options"]  # fixtures


def more_sent(service: Service, batch: str, count: int) -> bool:
    """Whether more than so many of a batch are sent."""
    return service.counts(batch)["sent"] > count


@POSTGRESQL
@pytest.mark.parametrize("simulator_options", [{"latency_ms": "100"}])
def test_ten_stops_of_all_workers_in_mid_batch_leave_nothing_unknown(service: Service) -> None:
    """A day of deploys: SIGTERM to all workers, ten times; each ends well, nothing is in doubt."""
    batch = service.enqueue(40_000)
    sent = 0
    for n in range(10):
        workers = [service.worker(f"{name}-{n}") for name in ("one", "two")]
        wait_until(partial(more_sent, service, batch, sent + 20), "some go")

        for worker in workers:
            worker.signal(signal.SIGTERM)
        assert [worker.process.wait(60) for worker in workers] == [0, 0]
        counts = service.counts(batch)
        assert counts["sending"] == counts["unknown"] == counts["failed"] == 0
        sent = counts["sent"]

    accepted = service.accepted()
    assert sent < 40_000, "it was over before the last stop"
    assert set(accepted.values()) == {1}
    assert len(accepted) == sent


@POSTGRESQL
@pytest.mark.parametrize("simulator_options", [{"latency_ms": "1000"}])
@pytest.mark.parametrize("remapped", [False, True], ids=["SIGQUIT", "REMAP_SIGTERM"])
def test_celery_s_cold_stop_leaves_nothing_unknown(service: Service, remapped: bool) -> None:
    """SIGQUIT, also where SIGTERM is mapped to it: what is in flight ends and is recorded."""
    if remapped:
        service.environment["REMAP_SIGTERM"] = "SIGQUIT"
    worker = service.worker("one")
    batch = service.enqueue(4000)
    wait_until(lambda: service.counts(batch)["sent"] > 10, "some are sent")

    worker.signal(signal.SIGTERM if remapped else signal.SIGQUIT)
    worker.process.wait(60)

    counts = service.counts(batch)
    assert counts["sending"] == counts["unknown"] == 0
    assert service.accepted() == Counter(dict.fromkeys(service.accepted(), 1))
    assert len(service.accepted()) == counts["sent"] < 4000
