"""How often and how many at once: what each key has asked of this process in the last minute, and what runs.

In memory: both are about now, and a process that ends takes its requests with it. Several servers each count their own.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from freehold.serve.errors import CODES, Failure
from freehold.serve.terms import Key

MINUTE_S = 60.0


@dataclass
class _Bucket:
    """Requests that may come now; it fills evenly, up to those of a minute."""

    level: float
    seen_s: float


class Rates:
    """Requests of keys that come and go. `enter` and `leave` are pairs; for one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}  # of keys in the database only, so strangers cannot make it grow
        self._running: Counter[str] = Counter()

    def enter(self, key: Key) -> Failure | None:
        """Return why a request must not run now, or None, and then it counts until it leaves."""
        limit = key.terms.concurrency
        if limit is not None and self._running[key.id] >= limit:
            return _too_many(f"this key may have {limit} requests at once, and they are running", 1)
        if (wait_s := self._wait_s(key)) > 0:
            limit = key.terms.requests_per_minute
            return _too_many(f"this key may make {limit} requests a minute", math.ceil(wait_s))
        self._running[key.id] += 1
        return None

    def leave(self, key: Key) -> None:
        """Take note that a request is over."""
        self._running[key.id] -= 1
        if not self._running[key.id]:
            del self._running[key.id]

    def _wait_s(self, key: Key) -> float:
        """Return how long until the key's next request, taking one where that is now."""
        limit, now_s = key.terms.requests_per_minute, self._clock()
        if limit is None:
            return 0.0
        bucket = self._buckets.setdefault(key.id, _Bucket(level=limit, seen_s=now_s))
        bucket.level = min(limit, bucket.level + (now_s - bucket.seen_s) * limit / MINUTE_S)
        bucket.seen_s = now_s
        if bucket.level < 1:
            return (1 - bucket.level) * MINUTE_S / limit
        bucket.level -= 1
        return 0.0


def _too_many(message: str, retry_after_s: int) -> Failure:
    return Failure(status=429, message=message, code=CODES[429], retry_after_s=retry_after_s)
