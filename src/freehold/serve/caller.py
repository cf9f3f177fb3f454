"""Who asks: what the guard found out about a request, and what is held against the caller's quota."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Caller:
    """key_id: of the API key, "" where none is needed. weight: its share of the machine beside others'."""

    key_id: str = ""
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"infer", "metrics", "admin"})


Reservation = Any  # what a kind of quotas hands out, to be handed back


class Quotas(Protocol):
    """Tokens are reserved at their worst case before work, and settled at what they were after it."""

    async def reserve(self, caller: Caller, tokens: int) -> Reservation:
        """Return what to settle. Raises: Overloaded where the caller's quota does not hold so many tokens."""

    async def settle(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a reservation by what was used."""
