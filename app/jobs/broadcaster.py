"""Those who follow jobs in this process: told what happens by one look at the database for all of them.

The look is a query every `ROUND_SECONDS`, by primary keys, while anybody follows anything; its price does not depend on how
many follow the same job. PostgreSQL's NOTIFY would save it, but takes a lock of the whole database at each commit, does not
pass a pooler of transactions, and has no like on SQLite: two ways to the same end, of which one would be tested less.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import structlog

from app.accounts import keys
from app.jobs import repository
from app.jobs.models import Event as EventRow
from app.jobs.states import TERMINAL
from app.kit import clock, sse
from app.kit.db import Database
from app.settings import HttpSettings
from secateur.problems import ProblemError
from secateur.schemas.events import Event

ROUND_SECONDS = 0.25
HEARTBEAT_SECONDS = 15.0
CHECK_KEYS_SECONDS = 30.0
RETRY_MILLISECONDS = 1_000
MAX_WAITING = 1_000
"""Events that wait for one slow client; with more it is dropped, and resumes when it can."""
_PAGE = 500
_JOBS_A_QUERY = 100  # a condition of more than a thousand terms is too deep for SQLite

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it goes over the line: made once, for all who follow the job."""

    seq: int
    frame: bytes
    is_end: bool


@dataclass(slots=True, eq=False)
class Follower:
    """One open stream: whose it is, and what waits to be sent on it."""

    job_id: str
    tenant_id: str
    key_id: str
    is_closed: bool = False
    _waiting: deque[Told] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, told: Told) -> None:
        if len(self._waiting) == MAX_WAITING:
            log.info("slow_stream_dropped", job_id=self.job_id, key=self.key_id)
            self.close()
        if not self.is_closed:
            self._waiting.append(told)
            self._wake.set()

    def close(self) -> None:
        """End the stream. The client may open it again, at its own place."""
        self.is_closed = True
        self._waiting.clear()
        self._wake.set()

    async def news(self, seconds: float) -> list[Told]:
        """What has happened meanwhile; empty if nothing did for `seconds`, or the stream is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return []
        self._wake.clear()
        news = list(self._waiting)
        self._waiting.clear()
        return news


@dataclass(slots=True)
class _Topic:
    """A job that is followed: the number of its newest event that was told, and to whom."""

    seq: int
    followers: set[Follower] = field(default_factory=set)


class Broadcaster:
    """Hands the events of jobs to their followers. No session is held while a stream is open."""

    def __init__(self, database: Database, limits: HttpSettings) -> None:
        self._database = database
        self._limits = limits
        self._topics: dict[str, _Topic] = {}
        self._streams: Counter[str] = Counter()
        """Open streams, by tenant."""
        self._somebody = asyncio.Event()
        self._is_over = False

    def join(self, job_id: str, *, seq: int, tenant_id: str, key_id: str) -> Follower:
        """Be told of the job's events behind `seq`, which its newest was not long ago; `leave` ends that.

        Raises `too_many_streams`.
        """
        if self._streams.total() >= self._limits.max_streams:
            raise _too_many(f"this process serves {self._limits.max_streams} streams, and no more")
        if self._streams[tenant_id] >= self._limits.max_streams_per_tenant:
            raise _too_many(f"{self._limits.max_streams_per_tenant} streams are open, as many as a tenant may have")
        follower = Follower(job_id, tenant_id, key_id)
        self._topics.setdefault(job_id, _Topic(seq)).followers.add(follower)
        self._streams[tenant_id] += 1
        self._somebody.set()
        if self._is_over:
            follower.close()
        return follower

    def leave(self, follower: Follower) -> None:
        topic = self._topics[follower.job_id]
        topic.followers.remove(follower)
        if not topic.followers:
            del self._topics[follower.job_id]
        self._streams[follower.tenant_id] -= 1
        if not self._streams[follower.tenant_id]:
            del self._streams[follower.tenant_id]
        if not self._topics:
            self._somebody.clear()

    async def frames(self, follower: Follower, *, after: int, ended: bool) -> AsyncIterator[bytes]:
        """All events behind number `after`: those of the database, then each as it happens, unless the job has `ended`.

        Ends with the job, or when the follower is closed. While nothing happens there is a heartbeat.
        """
        yield sse.retry(RETRY_MILLISECONDS)
        while page := await self._page(follower.job_id, after):
            yield _joined(page)
            after = page[-1].seq
            ended = ended or any(told.is_end for told in page)
        while not (ended or follower.is_closed):
            heard = await follower.news(HEARTBEAT_SECONDS)
            # What came while the database was read is known already.
            news = [told for told in heard if told.seq > after]
            if news:
                yield _joined(news)
                after, ended = news[-1].seq, any(told.is_end for told in news)
            elif not heard:
                yield sse.HEARTBEAT

    async def run(self, stopping: asyncio.Event) -> None:
        """Tell followers what happens, until `stopping` is set; then close every stream."""
        rounds = asyncio.create_task(self._rounds())
        try:
            await stopping.wait()
        finally:
            rounds.cancel()
            self._is_over = True
            for follower in self._followers():
                follower.close()

    async def _rounds(self) -> None:
        loop = asyncio.get_running_loop()
        checked_at = loop.time()
        while True:
            await self._somebody.wait()
            try:
                while await self._tell_news():
                    pass
                if loop.time() - checked_at > CHECK_KEYS_SECONDS:
                    checked_at = loop.time()
                    await self._check_keys()
            except Exception:
                # A database that is away comes back: streams stay open meanwhile, and miss nothing.
                log.warning("broadcast_round_failed", exc_info=True)
            await asyncio.sleep(ROUND_SECONDS)

    async def _tell_news(self) -> bool:
        """Tell what is new; whether there may be more of it."""
        async with self._database.read() as session:
            heads = await repository.event_heads(session, list(self._topics))
            behind = ((id_, topic.seq) for id_, topic in self._topics.items() if heads.get(id_, 0) > topic.seq)
            some = dict(islice(behind, _JOBS_A_QUERY))
            rows = await repository.events_behind(session, some, _PAGE) if some else []
        for row in rows:
            topic = self._topics.get(row.job_id)
            if topic is not None and row.seq > topic.seq:
                topic.seq = row.seq
                told = _told(row)
                for follower in topic.followers:
                    follower.tell(told)
        return len(rows) == _PAGE or (len(some) == _JOBS_A_QUERY and bool(rows))

    async def _check_keys(self) -> None:
        """Close the streams whose key is not in force any more."""
        followers = self._followers()
        async with self._database.read() as session:
            valid = await keys.in_force(session, {follower.key_id for follower in followers}, at=clock.now())
        for follower in followers:
            if follower.key_id not in valid:
                follower.close()

    async def _page(self, job_id: str, after: int) -> Sequence[Told]:
        async with self._database.read() as session:
            return [_told(row) for row in await repository.events_after(session, job_id, after, _PAGE)]

    def _followers(self) -> list[Follower]:
        return [follower for topic in self._topics.values() for follower in topic.followers]


def _told(row: EventRow) -> Told:
    event = Event.model_validate(row)
    is_end = event.type == "status" and event.data.get("status") in TERMINAL
    return Told(event.seq, sse.frame(event.seq, event.type, event.model_dump_json()), is_end)


def _joined(news: Sequence[Told]) -> bytes:
    return b"".join(told.frame for told in news)


def _too_many(detail: str) -> ProblemError:
    return ProblemError("too_many_streams", detail, hint="Close some, or list events with `?after=` from time to time.")
