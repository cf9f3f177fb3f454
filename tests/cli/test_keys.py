"""`freehold keys`: the key is shown once, and what it says is what the server goes by."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from cli.commands import assert_refused, call
from freehold.serve.database import Database
from freehold.serve.keys import Keys
from freehold.serve.terms import Terms


@pytest.fixture
def url(tmp_path, monkeypatch) -> str:
    """Return the database that the commands use by themselves."""
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    monkeypatch.setenv("FREEHOLD_DATABASE", url)
    return url


def found(url: str, token: str):
    database = Database(url)
    key = Keys(database).find(token)
    database.close()
    return key


def test_the_key_alone_is_on_stdout_so_that_a_script_can_take_it(url):
    ended = call("keys", "add", "laptop")
    assert ended.code == 0
    assert re.fullmatch(r"fh-[a-z2-7]{12}-[A-Za-z0-9_-]{43}\n", ended.out)
    assert "cannot be shown again" in ended.err
    assert found(url, ended.out.strip()).terms == Terms()


def test_every_option_reaches_the_key(url):
    before = datetime.now(UTC)
    options = "--scopes infer,metrics --expires 2w --requests-per-minute 6 --concurrency 2 --tokens-per-day 1000"
    ended = call("keys", "add", "ci", *options.split(), "--weight", "2.5", "--json")
    shown = json.loads(ended.out)
    key = found(url, shown["key"])
    assert key.terms == Terms(
        scopes=frozenset({"infer", "metrics"}),
        expires_at=datetime.fromisoformat(shown["expires_at"]),
        requests_per_minute=6,
        concurrency=2,
        tokens_per_day=1000,
        weight=2.5,
    )
    assert before + timedelta(weeks=2) <= key.terms.expires_at <= datetime.now(UTC) + timedelta(weeks=2)


def test_no_list_shows_a_secret(url):
    token = call("keys", "add", "laptop").out.strip()
    listed = [call("keys", "list"), call("keys", "list", "--json")]
    assert all(token.split("-")[1] in ended.out for ended in listed)
    assert not any(token[16:] in ended.out for ended in listed)
    assert "laptop" in listed[0].out
    assert json.loads(listed[1].out)[0]["state"] == "active"


def test_a_revoked_key_is_listed_as_that(url):
    shown = json.loads(call("keys", "add", "laptop", "--json").out)
    assert call("keys", "revoke", shown["id"]).out == f"revoked {shown['id']} (laptop)\n"
    assert "revoked" in call("keys", "list").out
    assert found(url, shown["key"]).state(datetime.now(UTC)) == "revoked"
    call("keys", "add", "again")
    assert json.loads(call("keys", "revoke", "again", "--json").out)["state"] == "revoked"


def test_where_there_are_no_keys_the_list_says_how_to_make_one(url):
    ended = call("keys", "list")
    assert (ended.code, ended.out) == (0, "")
    assert "freehold keys add" in ended.err
    assert json.loads(call("keys", "list", "--json").out) == []


def test_the_database_of_the_option_goes_before_that_of_the_environment(url, tmp_path):
    other = f"sqlite:///{tmp_path / 'other' / 'keys.db'}"
    token = call("keys", "add", "laptop", "--database", other).out.strip()
    assert found(url, token) is None
    assert found(other, token) is not None


def test_without_a_database_in_the_environment_it_lies_with_the_users_data(tmp_path, monkeypatch):
    monkeypatch.delenv("FREEHOLD_DATABASE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    token = call("keys", "add", "laptop").out.strip()
    assert found(f"sqlite:///{tmp_path / 'freehold' / 'freehold.db'}", token) is not None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["add", "x", "--scopes", "infer,root"], "BadInput"),
        (["add", "x", "--scopes", ","], "BadInput"),
        (["add", "x", "--expires", "soon"], "BadRequest"),
        (["add", "x", "--expires", "0d"], "BadRequest"),
        (["add", "x", "--expires=-1d"], "BadRequest"),
        (["add", "x", "--tokens-per-day", "0"], "BadUsage"),
        (["add", "x", "--weight", "nan"], "BadInput"),
        (["add", "\x1b[2J"], "BadInput"),
        (["add"], "BadUsage"),
        (["revoke", "nobody"], "NotFound"),
        (["list", "--database", "oracle://x"], "BadInput"),
        (["list", "--database", "nonsense"], "BadInput"),
        (["forget"], "BadUsage"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(url, arguments, kind):
    assert_refused(call("keys", *arguments), kind)


def test_keys_alone_shows_its_help(url):
    assert "revoke" in call("keys").out
