"""A worker process's beginning and end, by Celery's signals."""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Any

from celery import signals
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning

from worker import runtime
from worker.config import Settings
from worker.logs import dress
from worker.model import InvalidSettings

log = logging.getLogger(__name__)

#: After a stop, lanes have the request timeout and so much more to land, in seconds.
LANDING = 5.0
#: So many new objects are looked through for garbage at a time.
GARBAGE = 10_000


class Alone(Worker):
    """A worker that asks no neighbours: they share nothing but SQL and Redis. Where Redis goes,
    Celery's gossip would fill the log with tracebacks and end a stop with an error.
    """

    def prepare_args(self, **kwargs: Any) -> dict[str, Any]:
        """As if --without-gossip and --without-mingle were given."""
        return {**super().prepare_args(**kwargs), "without_gossip": True, "without_mingle": True}


@signals.after_setup_logger.connect(weak=False)
@signals.after_setup_task_logger.connect(weak=False)
def _dress_logs(logger: logging.Logger, **_: Any) -> None:
    dress(logger, programs=Settings.from_env().log_format == "json")


@signals.worker_shutting_down.connect(weak=False)
def _shutting_down(**_: Any) -> None:
    """SIGTERM: nothing new is claimed; what is in flight ends and is recorded."""
    runtime.current().stop.set()


@signals.worker_shutdown.connect(weak=False)
def _shutdown(**_: Any) -> None:
    rt = runtime.current()
    rt.stop.set()
    rt.lanes.wait_until_idle(rt.settings.request_timeout.total_seconds() + LANDING)
    rt.close()


@signals.celeryd_init.connect(weak=False)
def _check_settings(**_: Any) -> None:
    try:
        rt = runtime.current()
        rt.settings.identity()
        rt.settings.credential()
        rt.settings.require_database_url()
        if rt.settings.staging:
            log.warning("staging: %s", rt.settings.staging)
    except InvalidSettings as error:
        raise SystemExit(f"postroom: {error}") from None


@signals.worker_ready.connect(weak=False)
def _mind_no_second_run(**_: Any) -> None:
    """Celery warns, at each loss of Redis, of tasks that would run twice. Ours may."""
    warnings.simplefilter("ignore", CPendingDeprecationWarning)


@signals.worker_ready.connect(weak=False)
def _spare_collections(**_: Any) -> None:
    """The garbage collector need not walk again and again over what the imports made.

    That would cost a third of a worker's processor time (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
