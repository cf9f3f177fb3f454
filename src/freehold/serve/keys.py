"""API keys: made, found, listed and withdrawn.

A key reads `fh-<id>-<secret>`. The id finds its row; of the secret only a SHA-256 is stored. That is enough, and a slow
hash would add nothing: slowness protects passwords that can be guessed, and a secret is 256 random bits.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sql

from freehold.errors import BadInput, NotFound
from freehold.serve.database import Database, api_keys, key_usage
from freehold.serve.terms import TOKEN, Key, Terms

ID_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
ID_LENGTH, SECRET_BYTES = 12, 32
MAX_NAME = 100
NOBODY = bytes(32)  # compared with where no key is found, so that this takes as long


@dataclass(frozen=True, kw_only=True)
class DayUsage:
    """What a key used on a day. reserved_tokens: of requests that run, or that a killed server left: they count."""

    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """What counts against the day's quota."""
        return self.prompt_tokens + self.completion_tokens + self.reserved_tokens


class Keys:
    """The keys of a database. Its functions wait for it: an event loop calls them through Database.call."""

    def __init__(self, database: Database):
        self.database = database

    def add(self, name: str, terms: Terms) -> tuple[Key, str]:
        """Return a new key, and what its owner sends, which cannot be had again."""
        if not (name.strip() == name and 1 <= len(name) <= MAX_NAME and name.isprintable()):
            raise BadInput(f"a key's name has 1 to {MAX_NAME} printable characters, with no space at its ends")
        now = datetime.now(UTC)
        if terms.expires_at is not None and terms.expires_at <= now:
            raise BadInput("the key would expire before it is made")
        key_id = "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH))
        secret = secrets.token_urlsafe(SECRET_BYTES)
        row = {
            "id": key_id,
            "secret_sha256": _digest(secret),
            "name": name,
            "scopes": " ".join(sorted(terms.scopes)),
            "expires_at": terms.expires_at and terms.expires_at.astimezone(UTC),
            "requests_per_minute": terms.requests_per_minute,
            "concurrency": terms.concurrency,
            "tokens_per_day": terms.tokens_per_day,
            "weight": terms.weight,
            "created_at": now,
            "revoked_at": None,
        }
        with self.database.begin() as connection:
            connection.execute(sql.insert(api_keys).values(row))
        return _key(row), f"fh-{key_id}-{secret}"

    def find(self, token: str) -> Key | None:
        """Return the key that a caller sent, expired and revoked ones too, or None where it is no key of ours.

        Found by its public id, then compared in constant time; an unknown id takes the same comparison.
        """
        match = TOKEN.fullmatch(token)
        if match is None:
            return None
        key_id, secret = match.groups()
        with self.database.begin() as connection:
            row = connection.execute(sql.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
        is_right = hmac.compare_digest(row["secret_sha256"] if row else NOBODY, _digest(secret))
        return _key(row) if row and is_right else None

    def all(self) -> list[Key]:
        """Return every key, oldest first."""
        with self.database.begin() as connection:
            rows = connection.execute(sql.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)).mappings()
            return [_key(row) for row in rows]

    def revoke(self, name: str) -> Key:
        """Return a key, named by its id or its name, that from now on opens nothing. Raises: NotFound, BadInput."""
        found = [key for key in self.all() if name in (key.id, key.name) and key.revoked_at is None]
        if not found:
            raise NotFound(f"there is no key {name!r} that could be revoked", hint="freehold keys list")
        if len(found) > 1:
            raise BadInput(f"{len(found)} keys have the name {name!r}", hint=f"use an id, such as {found[0].id}")
        is_it = api_keys.c.id == found[0].id
        with self.database.begin() as connection:
            connection.execute(sql.update(api_keys).where(is_it).values(revoked_at=datetime.now(UTC)))
            return _key(connection.execute(sql.select(api_keys).where(is_it)).mappings().one())

    def usage_on(self, day: date) -> dict[str, DayUsage]:
        """Return what each key used on a day, by key id; keys that used nothing are left out."""
        with self.database.begin() as connection:
            rows = connection.execute(sql.select(key_usage).where(key_usage.c.day == day)).mappings()
            return {
                row["key_id"]: DayUsage(**{name: count for name, count in row.items() if name not in ("key_id", "day")})
                for row in rows
            }


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: Any) -> Key:
    terms = Terms(
        scopes=frozenset(row["scopes"].split()),
        expires_at=_utc(row["expires_at"]),
        requests_per_minute=row["requests_per_minute"],
        concurrency=row["concurrency"],
        tokens_per_day=row["tokens_per_day"],
        weight=row["weight"],
    )
    return Key(
        id=row["id"],
        name=row["name"],
        terms=terms,
        created_at=_utc(row["created_at"]),
        revoked_at=_utc(row["revoked_at"]),
    )


def _utc(stored: Any) -> Any:
    """Return a time, if there is one, in UTC; SQLite keeps no zone, and what we store is UTC."""
    return stored and (stored if stored.tzinfo else stored.replace(tzinfo=UTC)).astimezone(UTC)
