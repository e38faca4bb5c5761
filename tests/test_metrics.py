"""What Prometheus is told of the service, and that it costs no walk over the backlog."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event

from tests.store_kit import Kit, opened
from tests.support import Processes, free_port, wait_until
from tests.test_spine import Service, service, simulator_options
from worker import exporter
from worker.config import Settings
from worker.meters import LATENCIES, Meters
from worker.model import Accepted, Answer
from worker.report import BEAT
from worker.runtime import Runtime

__all__ = ["service", "simulator_options"]

ROOT = Path(__file__).parent.parent
Scraped = dict[tuple[str, ...], float]

sqlite_only = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def parsed(page: str) -> Scraped:
    """name and label values → value, of our own metrics."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.fixture
def scrape(redis_url: str, migrated_url: str) -> Iterator[Callable[[], Scraped]]:
    """One scrape of an exporter in this process."""
    rt = Runtime(Settings.from_env(redis_url=redis_url, database_url=migrated_url))
    port, stop = exporter.serve(rt, "127.0.0.1", 0)

    def page() -> Scraped:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return parsed(answer.read().decode())

    yield page
    stop()
    rt.close()


def test_the_way_of_a_batch_shows_in_the_metrics(service: Service, scrape: Any) -> None:
    """Outcomes, latency, tokens, workers: counted by the workers, told by one exporter."""
    service.simulator.fault("status", 2, status=400, code="ErrorInvalidParameter")
    service.simulator.fault("throttle", 1, retry_after=1)
    service.worker("one")
    service.wait_for_end(service.enqueue(30))

    def counted() -> Scraped:
        found: Scraped = scrape()
        whole = found.get(("postroom_attempts_total", "accepted"), 0) == 28
        return found if whole else {}

    found = wait_until(counted, "the workers have told their counts")
    assert found["postroom_up", "redis"] == found["postroom_up", "database"] == 1
    assert found["postroom_attempts_total", "rejected"] == 2
    assert found["postroom_attempts_total", "throttled"] >= 1
    assert found["postroom_attempt_seconds_count",] == sum(
        n for name, n in found.items() if name[0] == "postroom_attempts_total"
    )
    assert found["postroom_attempt_seconds_bucket", "+Inf"] >= 31
    assert found["postroom_attempt_seconds_sum",] > 28 * 0.05, "the simulator takes 50 ms"
    assert found["postroom_token_requests_total",] == 1
    assert found["postroom_workers",] == 1
    assert found["postroom_messages", "failed"] == 2
    assert found["postroom_messages", "queued"] == 0
    assert found["postroom_inbox_chunks",] == 0


def test_depth_and_age_are_told_by_target_and_priority_in_bounded_number(
    migrated_url: str, scrape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many mailboxes there are: the fullest by name, the others together."""
    monkeypatch.setattr(exporter, "TARGETS", 2)
    kit = Kit(migrated_url)
    for n in range(5):
        kit.batch(5 - n, target=f"m{n}@contoso.com")
    kit.engine.dispose()

    found = scrape()

    depth = {name[1:]: n for name, n in found.items() if name[0] == "postroom_queue_depth"}
    assert sum(depth.values()) == 15
    assert depth["normal", "m0@contoso.com"] == 5
    assert ("normal", "(others)") in depth
    ages = {name[1:] for name in found if name[0] == "postroom_oldest_due_seconds"}
    assert ("normal", "(others)") in ages
    assert found["postroom_messages", "queued"] == 15
    assert found["postroom_messages_capped",] == 0
    assert found["postroom_batches", "running"] == 5


@sqlite_only
def test_a_server_that_is_gone_is_told_and_the_other_half_still_comes(
    migrated_url: str, scrape: Any, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """An exporter that fails as a whole would hide what it knows."""
    redis_client.set(BEAT, "1", ex=60)
    rt = Runtime(Settings.from_env(redis_url="redis://127.0.0.1:9/0", database_url=migrated_url))
    families = {family.name: family for family in exporter.Exporter(rt).collect()}
    rt.close()
    up = {s.labels["part"]: s.value for s in families["postroom_up"].samples}
    assert up == {"redis": 0, "database": 1}
    assert "postroom_messages" in families
    assert scrape()["postroom_beat_heard",] == 1


def test_counts_that_redis_did_not_take_are_kept_for_the_next_time(
    redis_client: redis.Redis, redis_url: str
) -> None:
    """They are added later, and once."""
    nowhere = redis.Redis.from_url("redis://127.0.0.1:9")
    with redis.Redis.from_url(redis_url) as client, nowhere as gone:
        meters = Meters(gone)
        meters.attempt(Accepted(Answer(duration=timedelta(seconds=0.3))))
        with pytest.raises(redis.RedisError):
            meters.flush()
        meters._redis = client
        meters.flush()
        meters.flush()
        assert Meters(client).read() == {
            "attempts:accepted": 1, f"latency:{LATENCIES.index(0.4)}": 1, "latency-ms": 300,
        }  # fmt: skip


def test_no_alert_speaks_of_a_metric_that_is_not_there(scrape: Any) -> None:
    """And each says what is so, and what to do."""
    there = {name[0] for name in scrape()} | {
        "postroom_attempts_total", "postroom_bounces_total", "postroom_oldest_due_seconds",
        "postroom_queue_depth",
    }  # fmt: skip
    rules = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        named = set(re.findall(r"postroom_\w+", rule["expr"]))
        assert named <= there, rule["alert"]
        assert {"summary", "do"} == set(rule["annotations"])


@pytest.mark.whole
@sqlite_only
def test_a_real_prometheus_scrapes_us_and_its_rules_are_good(
    processes: Processes, tmp_path: Path, redis_url: str, migrated_url: str
) -> None:
    """promtool takes the rules; the server reads our page and fires the alert that is due."""
    assert shutil.which("prometheus"), "apt-get install prometheus"
    rules = ROOT / "docs" / "alerts.yml"
    checked = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True,
                             check=False)  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    port, prometheus = free_port(), free_port()
    settings = {"POSTROOM_REDIS_URL": redis_url, "POSTROOM_DATABASE_URL": migrated_url}
    processes.start(["postroom", "metrics", f"--port={port}"], env=settings, log="metrics")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": "postroom", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    processes.start(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml",
         f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{prometheus}"],
        log="prometheus",
    )  # fmt: skip

    def ask(query: str) -> list[Any]:
        url = f"http://127.0.0.1:{prometheus}/api/v1/query?query={query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return list(json.load(answer)["data"]["result"])
        except OSError:
            return []

    [up] = wait_until(lambda: ask("up"), "Prometheus has scraped us", 60)
    assert wait_until(lambda: ask("postroom_up==1"), "our metrics are there", 60)
    assert up["metric"]["job"] == "postroom"


@sqlite_only
def test_a_scrape_reads_no_message_that_is_not_in_trouble(migrated_url: str) -> None:
    """SQLite takes a partial index only for its own words: the failed and unknown go by theirs."""
    said: list[tuple[str, Any]] = []
    with opened(migrated_url) as kit:
        event.listen(kit.engine, "before_cursor_execute", lambda *given: said.append(given[2:4]))
        kit.store.gauges.taken()
        [(asked, values)] = [one for one in said if "'suppressed'" in one[0]]
        with kit.engine.connect() as connection:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}", values)
            plan = " ".join(row[3] for row in rows)
    assert "SEARCH messages USING COVERING INDEX ix_messages_ended" in plan
