"""The daily token quota of keys, held in the database so that it outlives any way a server can end.

A request reserves the most it can take before any work, and is settled at what it took. What was never settled, because
a server was killed, stays reserved and counts as used until the day (UTC) ends: nobody gets more than their quota by
crashing a server, and no server has to find out which others still live. Each step is one conditional UPDATE, so any
number of servers can share a database.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import sqlalchemy as sql

from freehold.errors import DatabaseFailed, Overloaded
from freehold.serve.caller import Caller
from freehold.serve.database import Database, api_keys, key_usage
from freehold.serve.errors import CODES, Refused

logger = logging.getLogger(__name__)

NO_QUOTA = 2**62


class QuotaSpent(Overloaded):
    """A key's tokens of the day do not hold what a request may take. retry_after_s: until they are new."""

    def __init__(self, message: str, *, hint: str, retry_after_s: int):
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class HeldTokens:
    """Tokens of a key's day that are held for a request until it is settled."""

    key_id: str
    day: date
    tokens: int


class DatabaseQuotas:
    """Quotas (see caller.py) in a database."""

    def __init__(self, database: Database):
        self._database = database
        self._released: set[asyncio.Task[None]] = set()  # kept, for an event loop forgets tasks that nobody holds

    async def reserve(self, caller: Caller, tokens: int) -> HeldTokens | None:
        """Return what to settle, None where no key is needed. Raises: QuotaSpent; Refused where nobody can know."""
        if not caller.key_id:
            return None
        now = datetime.now(UTC)
        held = HeldTokens(key_id=caller.key_id, day=now.date(), tokens=tokens)
        reserving = asyncio.ensure_future(self._database.call(self._reserve, held))
        try:
            left = await asyncio.shield(reserving)
        except asyncio.CancelledError:  # the client is gone, and nobody else would settle
            self._release_after(reserving, held)
            raise
        except DatabaseFailed as error:
            logger.error("no quota could be reserved: %s", error.message)
            raise Refused("quotas cannot be checked at the moment", code=CODES[503], status=503) from None
        if left is None:
            return held
        midnight = datetime.combine(held.day + timedelta(days=1), time(), UTC)
        raise QuotaSpent(
            f"this request may take {tokens} tokens, and the key has {max(left, 0)} left today",
            hint="a smaller max_tokens takes less; the day ends at midnight UTC",
            retry_after_s=int((midnight - now).total_seconds()) + 1,
        )

    async def settle(self, reservation: HeldTokens | None, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a reservation, once, by what was used; where the database fails, the reservation stays."""
        if reservation is None:
            return
        try:
            await self._database.call(self._settle, reservation, prompt_tokens, completion_tokens)
        except DatabaseFailed as error:
            logger.error("%d tokens of key %s stay reserved: %s", reservation.tokens, reservation.key_id, error.message)

    def _release_after(self, reserving: asyncio.Future[int | None], held: HeldTokens) -> None:
        async def release() -> None:
            try:
                is_held = await reserving is None
            except DatabaseFailed:
                return
            if is_held:
                await self.settle(held, 0, 0)

        task = asyncio.ensure_future(release())
        self._released.add(task)
        task.add_done_callback(self._released.discard)

    def _reserve(self, held: HeldTokens) -> int | None:
        """Return None where the tokens are held now, else how many could be."""
        used = key_usage.c.prompt_tokens + key_usage.c.completion_tokens + key_usage.c.reserved_tokens
        limit = sql.select(api_keys.c.tokens_per_day).where(api_keys.c.id == held.key_id).scalar_subquery()
        left = sql.func.coalesce(limit, NO_QUOTA) - used
        taking = sql.update(key_usage).where(_is_day(held), left >= held.tokens)
        with self._database.begin() as connection:
            # A write comes first: SQLite then takes its lock at once, and never has to give up between two steps.
            first = self._database.insert_missing(key_usage, {"key_id": held.key_id, "day": held.day})
            connection.execute(first)
            is_held = connection.execute(
                taking.values(
                    reserved_tokens=key_usage.c.reserved_tokens + held.tokens,
                    num_requests=key_usage.c.num_requests + 1,
                )
            ).rowcount
            return None if is_held else connection.execute(sql.select(left).where(_is_day(held))).scalar_one()

    def _settle(self, held: HeldTokens, prompt_tokens: int, completion_tokens: int) -> None:
        with self._database.begin() as connection:
            connection.execute(
                sql.update(key_usage)
                .where(_is_day(held))
                .values(
                    reserved_tokens=key_usage.c.reserved_tokens - held.tokens,
                    prompt_tokens=key_usage.c.prompt_tokens + prompt_tokens,
                    completion_tokens=key_usage.c.completion_tokens + completion_tokens,
                )
            )


def _is_day(held: HeldTokens) -> sql.ColumnElement[bool]:
    return sql.and_(key_usage.c.key_id == held.key_id, key_usage.c.day == held.day)
