"""Who asks: what the guard found out about a request, and what is held against the caller's quota."""

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(kw_only=True)
class Spent:
    """What a request has taken so far: tokens of all its answers together, and the longest times of any.

    queue_s, prefill_s, decode_s: until the engine began, from there to the first token, and from that to the last one
    that was taken note of. finish: how an answer ended, "cancelled" where its client left; None where there is none.
    """

    prompt_tokens: int = 0
    answer_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    finish: str | None = None


@dataclass(frozen=True, kw_only=True)
class Caller:
    """key_id: of the API key, "" where none is needed. weight: its share of the machine beside others'.

    request_id, spent: of the one request that is answered.
    """

    key_id: str = ""
    request_id: str = ""
    spent: Spent = field(default_factory=Spent, compare=False)
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"infer", "priority", "metrics", "admin"})


Reservation = Any  # what a kind of quotas hands out, to be handed back


class Quotas(Protocol):
    """Tokens are reserved at their worst case before work, and settled at what they were after it."""

    async def reserve(self, caller: Caller, tokens: int) -> Reservation:
        """Return what to settle. Raises: Overloaded where the caller's quota does not hold so many tokens."""

    async def settle(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a reservation by what was used."""
