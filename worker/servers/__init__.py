"""The embedded servers of demo and tests: a real Redis, a real PostgreSQL, and processes that
never outlive their starter. Nothing listens beyond unix sockets and loopback; nothing is printed.
"""

from worker.servers.child import Child, ServerError
from worker.servers.postgres import PostgresServer, find_postgres
from worker.servers.redis import RedisServer, find_redis

__all__ = [
    "Child",
    "PostgresServer",
    "RedisServer",
    "ServerError",
    "find_postgres",
    "find_redis",
]
