"""Alembic's entry: the tables are defined once, in worker.store.schema."""

from alembic import context
from sqlalchemy import text

from worker.store.engine import make_engine
from worker.store.schema import metadata

#: Serialises upgrades that start together (PostgreSQL advisory lock; any constant will do).
UPGRADE_LOCK = 7_220_413


def _url_and_schema() -> tuple[str, str | None]:
    attributes = context.config.attributes
    if "url" in attributes:
        return attributes["url"], attributes.get("schema")
    from worker.config import Settings

    settings = Settings.from_env()
    return settings.require_database_url(), settings.db_schema


def run() -> None:
    url, schema = _url_and_schema()
    engine = make_engine(url, patience=None)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Upgrades that start together wait for each other, however long the first one takes.
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("SET lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": UPGRADE_LOCK})
            if schema:
                quoted = engine.dialect.identifier_preparer.quote_schema(schema)
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {quoted}"))
                connection.execute(text(f"SET search_path TO {quoted}"))
            connection.commit()
        else:
            # SQLite's one lock, taken before the revision is read and kept to the last migration.
            connection.begin()
        context.configure(
            connection=connection,
            target_metadata=metadata,
            version_table="postroom_version",
            compare_server_default=False,
            transaction_per_migration=True,
            include_name=lambda name, kind, _: kind != "table" or name in metadata.tables,
        )
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    engine.dispose()


run()
