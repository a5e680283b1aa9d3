"""One way to the database, on SQLite and on PostgreSQL.

Nothing inside the service commits: `Database.write()` and `Database.read()` are the boundaries that a request or task opens.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Connection, DateTime, Dialect, MetaData, NullPool, event, func, make_url, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator

from app.kit import clock

BUSY_TIMEOUT_MS = 10_000
# A PostgreSQL that is silent, not refusing, must be noticed well within a lease.
_KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
_PATIENCE = {"connect_timeout": 5, "tcp_user_timeout": 10_000, **_KEEPALIVES}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets the zone, so it is taken off on the way in and put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


def storable(value: Any) -> Any:
    """`value` as both databases can keep it: PostgreSQL knows neither NUL nor lone surrogates, and JSON no NaN and infinity.

    The former become U+FFFD, the latter null; model files and logs may hold any of them.
    """
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {storable(str(key)): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


def _to_json(value: Any) -> str:
    return json.dumps(storable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Base(DeclarativeBase):
    """Where every table is declared; constraints are named, so that a migration can change them on both databases."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own form)
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        list[str]: Json,
        list[dict[str, Any]]: Json,
    }


class Database:
    """An engine and its two kinds of session."""

    def __init__(self, url: str, *, pool_size: int = 10, pooled: bool = True) -> None:
        """`pooled=False` opens a connection a session: for a task that runs its own event loop."""
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_size": pool_size} if pooled else {"poolclass": NullPool}
        if make_url(url).get_backend_name() == "postgresql":
            options["connect_args"] = _PATIENCE
        self.engine: AsyncEngine = create_async_engine(url, json_serializer=_to_json, **options)
        if self.is_sqlite:
            event.listen(self.engine.sync_engine, "connect", _configure_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
        # SQLite has one writer at a time and lets the others try again and again: in one process, queue instead.
        self._turn: AbstractAsyncContextManager[None] = asyncio.Lock() if self.is_sqlite else nullcontext()
        # On SQLite every transaction sees one state; PostgreSQL has to be told.
        one_state: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._reader = self.engine if self.is_sqlite else self.engine.execution_options(**one_state)
        self._writer = self.engine.execution_options(sqlite_begin="IMMEDIATE")

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session that sees one state of the database and changes nothing."""
        async with AsyncSession(self._reader, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed when the block ends, rolled back when it raises.

        On SQLite it takes the write lock at once, so that what it reads cannot change before it writes.
        """
        async with self._turn, AsyncSession(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    async def close(self) -> None:
        await self.engine.dispose()


async def moment(session: AsyncSession) -> datetime:
    """Now, by the database's clock: leases are compared across machines, whose own clocks may differ."""
    if session.get_bind().dialect.name == "sqlite":
        return clock.now()
    at: datetime = (await session.execute(select(func.clock_timestamp()))).scalar_one()
    return at.astimezone(UTC)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # SQLAlchemy begins transactions itself (below); the driver's own habit of doing so would begin them too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")
