"""`freehold keys`: who may ask the server, and how much."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import options
from freehold.cli.terminal import show_json, show_line, show_note, show_table
from freehold.errors import BadRequest
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.serve.keys import DayUsage, Keys
    from freehold.serve.terms import Key

DURATION = re.compile(r"([0-9]{1,5})([mhdw])", re.ASCII)
UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}

app = typer.Typer(name="keys", rich_markup_mode=None, add_completion=False)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="sqlite:///FILE or postgresql://USER@HOST/NAME. Without it FREEHOLD_DATABASE, or a file of "
        "this user. A password is safer in FREEHOLD_DATABASE: other users can see a command line.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def keys(context: typer.Context) -> None:
    """Make, list and revoke API keys: a server that others can reach answers nobody without one.

    Examples:

    \b
      freehold keys add payroll --expires 90d --tokens-per-day 2000000
      freehold keys list
    """
    if context.invoked_subcommand is None:
        show_line(context.get_help())


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, or what for.", show_default=False)],
    scopes: Annotated[
        str,
        typer.Option(
            help="What it opens, with commas between: infer (the models), priority (ahead of others), metrics, admin."
        ),
    ] = "infer",
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long it is good: 90m, 12h, 30d, 8w. Without it, until revoked."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests in a minute.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests that run at once.")] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Most tokens, of prompts and answers together, in a day (UTC).")
    ] = None,
    weight: Annotated[float, typer.Option(help="Its share of the machine beside other keys'.")] = 1.0,
    database: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Make a key and print it, this once: only a digest of it is kept.

    Examples:

    \b
      freehold keys add laptop
      freehold keys add ci --expires 30d --requests-per-minute 60 --tokens-per-day 1000000
      freehold keys add prometheus --scopes metrics
    """
    from freehold.serve.terms import Terms

    terms = Terms(
        scopes=frozenset(part.strip() for part in scopes.split(",") if part.strip()),
        expires_at=datetime.now(UTC) + _duration(expires) if expires is not None else None,
        requests_per_minute=requests_per_minute,
        concurrency=concurrency,
        tokens_per_day=tokens_per_day,
        weight=weight,
    )
    with _opened(database) as store:
        key, token = store.add(name, terms)
    if as_json:
        show_json(_described(key) | {"key": token})
        return
    show_line(token)
    show_note("Keep it now: it cannot be shown again.")


@app.command("list")
def list_keys(database: DatabaseUrl = None, as_json: options.Json = False) -> None:
    """List all keys, without their secrets, and what each used today (UTC).

    Tokens of requests that run, or that a killed server left behind, count as used until the day ends.
    """
    with _opened(database) as store:
        found, usage = store.all(), store.usage_on(datetime.now(UTC).date())
    if as_json:
        show_json([_described(key, usage.get(key.id)) for key in found])
    elif found:
        head = ("ID", "NAME", "STATE", "SCOPES", "EXPIRES", "TODAY", "OF TOKENS", "PER MINUTE", "AT ONCE", "WEIGHT")
        show_table([head, *(_row(key, usage.get(key.id)) for key in found)])
    else:
        show_note("There are no keys yet: freehold keys add NAME")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id, or its name.", show_default=False)],
    database: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Revoke a key: from now on it opens nothing. Answers that it asked for before come to their end."""
    with _opened(database) as store:
        revoked = store.revoke(key)
    if as_json:
        show_json(_described(revoked))
    else:
        show_line(f"revoked {revoked.id} ({revoked.name})")


@contextmanager
def _opened(url: str | None) -> Iterator["Keys"]:
    from freehold.serve.database import Database
    from freehold.serve.keys import Keys

    database = Database(Settings().database_url if url is None else url)
    try:
        yield Keys(database)
    finally:
        database.close()


def _duration(text: str) -> timedelta:
    match = DURATION.fullmatch(text)
    if match is None or not int(match[1]):
        raise BadRequest(f"--expires is {text!r}", hint="a number and m, h, d or w, such as 30d")
    return int(match[1]) * UNITS[match[2]]


def _described(key: "Key", usage: "DayUsage | None" = None) -> dict[str, Any]:
    """Return a key as JSON."""
    from freehold.serve.keys import DayUsage

    terms, used = key.terms, usage or DayUsage()
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state(datetime.now(UTC)),
        "scopes": sorted(terms.scopes),
        "created_at": key.created_at.isoformat(),
        "expires_at": terms.expires_at and terms.expires_at.isoformat(),
        "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
        "requests_per_minute": terms.requests_per_minute,
        "concurrency": terms.concurrency,
        "tokens_per_day": terms.tokens_per_day,
        "weight": terms.weight,
        "today": {
            "requests": used.num_requests,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "reserved_tokens": used.reserved_tokens,
        },
    }


def _row(key: "Key", usage: "DayUsage | None") -> tuple[str, ...]:
    terms = key.terms
    limits = (terms.tokens_per_day, terms.requests_per_minute, terms.concurrency)
    return (
        key.id,
        key.name,
        key.state(datetime.now(UTC)),
        ",".join(sorted(terms.scopes)),
        f"{terms.expires_at:%Y-%m-%d %H:%M}" if terms.expires_at else "-",
        str(usage.num_tokens if usage else 0),
        *("-" if limit is None else str(limit) for limit in limits),
        f"{terms.weight:g}",
    )
