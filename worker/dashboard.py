"""Flower's defaults, so that `celery -A worker flower` shows what an operator needs.

They lie below Flower's own ways: a variable FLOWER_<OPTION>, a flowerconfig.py and the command line
all win over them.
"""

from __future__ import annotations

from typing import Any

#: For each task what it works at and what became of it, before when and where.
COLUMNS = "name,state,args,result,exception,received,runtime,worker"


def set_defaults(basic_auth: str | None) -> None:
    """To be called before Flower reads its options. `basic_auth`: NAME:PASSWORD, or none."""
    import flower.options  # defines them
    from tornado.options import options

    given: dict[str, Any] = {
        "address": "127.0.0.1",  # /metrics and /healthcheck never ask for a password
        "tasks_columns": COLUMNS,
        "max_tasks": 10_000,  # about 5 KB each
        "purge_offline_workers": 300,
    }
    if basic_auth:
        given["basic_auth"] = [basic_auth]
    for name, value in given.items():
        setattr(options, name, value)
    assert flower.options.default_options is options  # noqa: S101  (else nothing would be set)
