"""Keys and their usage, on both databases that Freehold speaks to."""

import asyncio
import re
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from freehold.errors import BadInput, DatabaseFailed, NotFound
from freehold.serve.caller import Caller
from freehold.serve.database import Database, metadata
from freehold.serve.errors import Refused, failure_of
from freehold.serve.keys import Keys
from freehold.serve.quota import DatabaseQuotas, QuotaSpent
from freehold.serve.terms import Terms
from serve.databases import KINDS, new_database

ALL_TERMS = Terms(
    scopes=frozenset({"infer", "metrics"}),
    expires_at=datetime(2999, 1, 2, 3, 4, 5, tzinfo=UTC),
    requests_per_minute=7,
    concurrency=2,
    tokens_per_day=10**12,
    weight=2.5,
)


@pytest.fixture(params=KINDS)
def url(request, tmp_path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def database(url):
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def keys(database) -> Keys:
    return Keys(database)


def used_today(keys: Keys, key_id: str):
    return keys.usage_on(datetime.now(UTC).date())[key_id]


def caller_of(key) -> Caller:
    return Caller(key_id=key.id)


def test_a_key_is_found_with_its_terms(keys):
    key, token = keys.add("alice", ALL_TERMS)
    assert re.fullmatch(r"fh-[a-z2-7]{12}-[A-Za-z0-9_-]{43}", token)
    assert token.split("-")[1] == key.id
    assert keys.find(token) == key == keys.all()[0]
    assert key.terms == ALL_TERMS
    assert key.state(datetime.now(UTC)) == "active"


def test_times_come_back_in_utc_whatever_zone_they_were_given_in(keys):
    expires = datetime(2999, 1, 1, tzinfo=UTC).astimezone()
    _, token = keys.add("a", Terms(expires_at=expires))
    found = keys.find(token)
    assert found.terms.expires_at == expires
    assert found.terms.expires_at.utcoffset() == found.created_at.utcoffset() == timedelta(0)
    assert abs(found.created_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_what_is_not_exactly_the_key_is_not_found(keys):
    _, token = keys.add("a", Terms())
    _, other = keys.add("b", Terms())
    wrong_secret = token[:16] + other[16:]
    unknown_id = "fh-aaaaaaaaaaaa" + token[15:]
    last = "B" if token[-1] == "A" else "A"
    for wrong in (wrong_secret, unknown_id, token[:-1] + last, token[:-1], f"{token}A", f"{token}\n", "", "fh--", "é"):
        assert keys.find(wrong) is None, wrong


def test_only_a_digest_of_the_secret_is_stored(keys, database):
    _, token = keys.add("a", Terms())
    with database.begin() as connection:
        rows = [repr(connection.execute(sql.select(table)).all()) for table in metadata.sorted_tables]
    assert token[16:] not in "".join(rows)


def test_a_revoked_key_stays_revoked_and_an_expired_one_expired(keys):
    now = datetime.now(UTC)
    key, token = keys.add("a", Terms(expires_at=now + timedelta(hours=1)))
    assert key.state(now + timedelta(minutes=59)) == "active"
    assert key.state(now + timedelta(minutes=61)) == "expired"
    assert keys.revoke(key.id).state(now) == "revoked"
    assert keys.find(token).state(now) == "revoked"
    with pytest.raises(NotFound, match="no key"):
        keys.revoke(key.id)


def test_a_name_revokes_a_key_only_where_it_names_one(keys):
    first, _ = keys.add("same", Terms())
    second, _ = keys.add("same", Terms())
    with pytest.raises(BadInput, match="2 keys have the name 'same'"):
        keys.revoke("same")
    keys.revoke(first.id)
    assert keys.revoke("same").id == second.id


@pytest.mark.parametrize(
    "make",
    [
        lambda: Terms(scopes=frozenset({"root"})),
        lambda: Terms(scopes=frozenset()),
        lambda: Terms(tokens_per_day=0),
        lambda: Terms(concurrency=10**16),
        lambda: Terms(weight=0.0),
        lambda: Terms(weight=float("nan")),
    ],
    ids=["scope", "no-scope", "no-tokens", "too-many", "no-weight", "nan"],
)
def test_terms_without_sense_are_refused(make):
    with pytest.raises(BadInput):
        make()


@pytest.mark.parametrize("name", ["", " a", "a\n", "a" * 101, "\x1b[31m"])
def test_names_that_could_not_be_shown_are_refused(keys, name):
    with pytest.raises(BadInput, match="a key's name"):
        keys.add(name, Terms())


def test_a_value_of_any_column_s_size_survives(keys):
    key, token = keys.add("ü" * 100, Terms(tokens_per_day=10**15, requests_per_minute=10**15, weight=0.1))
    assert keys.find(token) == key


def test_tokens_are_reserved_then_settled(keys, database):
    quotas = DatabaseQuotas(database)
    key, _ = keys.add("a", Terms(tokens_per_day=100))
    held = asyncio.run(quotas.reserve(caller_of(key), 70))
    assert used_today(keys, key.id).num_tokens == 70
    with pytest.raises(QuotaSpent, match="may take 31 tokens, and the key has 30 left") as spent:
        asyncio.run(quotas.reserve(caller_of(key), 31))
    assert 0 < spent.value.retry_after_s <= 86_401
    assert failure_of(spent.value).status == 429
    asyncio.run(quotas.settle(held, 20, 5))
    usage = used_today(keys, key.id)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reserved_tokens, usage.num_requests) == (20, 5, 0, 1)
    asyncio.run(quotas.reserve(caller_of(key), 75))


def test_settling_one_request_leaves_what_others_hold(keys, database):
    quotas = DatabaseQuotas(database)
    key, _ = keys.add("a", Terms(tokens_per_day=100))
    other, _ = keys.add("b", Terms())
    first = asyncio.run(quotas.reserve(caller_of(key), 30))
    asyncio.run(quotas.reserve(caller_of(key), 40))
    asyncio.run(quotas.reserve(caller_of(other), 50))
    asyncio.run(quotas.settle(first, 1, 1))
    assert used_today(keys, key.id).reserved_tokens == 40
    assert used_today(keys, other.id).reserved_tokens == 50


def test_usage_is_counted_without_a_quota_too(keys, database):
    quotas = DatabaseQuotas(database)
    key, _ = keys.add("a", Terms())
    held = asyncio.run(quotas.reserve(caller_of(key), 10**12))
    asyncio.run(quotas.settle(held, 3, 4))
    assert used_today(keys, key.id).num_tokens == 7


def test_a_client_that_leaves_while_tokens_are_reserved_leaves_none_behind(keys, database):
    key, _ = keys.add("a", Terms(tokens_per_day=100))

    async def leave() -> None:
        quotas = DatabaseQuotas(database)
        asking = asyncio.create_task(quotas.reserve(caller_of(key), 60))
        await asyncio.sleep(0)  # it has begun
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await quotas.settle(await reserved_soon(quotas, caller_of(key)), 0, 0)

    asyncio.run(leave())
    assert used_today(keys, key.id).num_tokens == 0


async def reserved_soon(quotas: DatabaseQuotas, caller: Caller):
    """Return a reservation of all tokens, as soon as nobody else holds some."""
    while True:
        try:
            return await quotas.reserve(caller, 100)
        except QuotaSpent:
            await asyncio.sleep(0.001)


def test_who_needs_no_key_has_no_quota(database):
    quotas = DatabaseQuotas(database)
    assert asyncio.run(quotas.reserve(Caller(), 10)) is None
    asyncio.run(quotas.settle(None, 1, 1))


def test_a_new_day_brings_new_tokens(keys, database):
    quotas = DatabaseQuotas(database)
    key, _ = keys.add("a", Terms(tokens_per_day=100))
    asyncio.run(quotas.reserve(caller_of(key), 100))
    with database.begin() as connection:
        connection.execute(sql.text("UPDATE key_usage SET day = '2020-01-01'"))
    asyncio.run(quotas.reserve(caller_of(key), 100))


def test_requests_at_once_never_get_more_than_the_quota(url, keys, database):
    key, _ = keys.add("a", Terms(tokens_per_day=100))
    other = Database(url)  # as another server would

    async def reserve_everywhere() -> int:
        both = [DatabaseQuotas(database), DatabaseQuotas(other)]
        reserving = [quotas.reserve(caller_of(key), 7) for quotas in both for _ in range(20)]
        results = await asyncio.gather(*reserving, return_exceptions=True)
        assert {type(result).__name__ for result in results} == {"HeldTokens", "QuotaSpent"}
        return sum(not isinstance(result, Exception) for result in results)

    assert asyncio.run(reserve_everywhere()) == 100 // 7
    other.close()
    assert used_today(keys, key.id).reserved_tokens == 98


def test_a_database_that_fails_lets_nobody_in_and_says_nothing_of_itself(keys, database):
    key, _ = keys.add("a", Terms(tokens_per_day=100))
    held = asyncio.run(DatabaseQuotas(database).reserve(caller_of(key), 10))
    with database.begin() as connection:
        connection.execute(sql.text("ALTER TABLE key_usage RENAME TO gone"))
    with pytest.raises(DatabaseFailed):
        used_today(keys, key.id)
    with pytest.raises(Refused) as refused:
        asyncio.run(DatabaseQuotas(database).reserve(caller_of(key), 10))
    assert (refused.value.status, refused.value.message) == (503, "quotas cannot be checked at the moment")
    asyncio.run(DatabaseQuotas(database).settle(held, 1, 1))  # the answer was given; the reservation stays


def test_migrations_make_the_tables_that_the_code_asks_for(database):
    with database.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_keeps_everything(url, keys, database):
    key, token = keys.add("a", Terms())
    again = Database(url)
    assert Keys(again).find(token) == key
    again.close()


def test_several_that_open_a_new_database_at_once_all_can(url):
    def open_and_add(name: str) -> None:
        database = Database(url)
        Keys(database).add(name, Terms())
        database.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(open_and_add, "abcd"))
    database = Database(url)
    assert {key.name for key in Keys(database).all()} == set("abcd")
    database.close()


def test_processes_that_open_a_new_database_at_once_all_can(url):
    code = "import sys; from freehold.serve.database import Database; Database(sys.argv[1]).close()"
    opening = [subprocess.Popen([sys.executable, "-W", "error", "-c", code, url]) for _ in range(3)]
    assert [process.wait() for process in opening] == [0, 0, 0]


def test_a_database_of_a_newer_version_is_left_alone(url, database):
    with database.begin() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(BadInput, match="newer Freehold"):
        Database(url)


def test_a_sqlite_file_is_for_its_owner_only(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'new' / 'keys.db'}")
    Keys(database).add("a", Terms())
    files = list((tmp_path / "new").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    database.close()


def test_a_writer_that_is_slow_is_waited_for(tmp_path):
    url = new_database("sqlite", tmp_path)
    database = Database(url)
    with ThreadPoolExecutor(1) as threads:
        other = sqlite3.connect(tmp_path / "keys.db")
        other.execute("BEGIN IMMEDIATE")
        adding = threads.submit(Keys(database).add, "a", Terms())
        other.rollback()
        other.close()
        assert adding.result()[0].name == "a"
    database.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not named by a URL"),
        ("mysql://localhost/x", "of the kind 'mysql'"),
        ("sqlite://", "in memory"),
        ("sqlite:////proc/none/keys.db", "cannot be opened"),
        ("postgresql://freehold:hunter2@127.0.0.1:1/x", "cannot be used"),
    ],
)
def test_a_url_that_leads_nowhere_ends_in_one_line_without_its_password(url, says):
    with pytest.raises(BadInput, match=says) as error:
        Database(url)
    assert "\n" not in error.value.message
    assert "hunter2" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "keys.db").write_text("not a database, but long enough to look like one? " * 100)
    with pytest.raises(BadInput, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'keys.db'}")


def test_server_without_keys_imports_no_database() -> None:
    code = "import sys, freehold.serve.app, freehold.serve.auth; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
