"""The database of keys and what they used: its tables, how it is opened, and where its calls run.

SQLite by default, PostgreSQL by URL. Whoever opens it brings its tables up to date first (migrations/), one at a time
where several open it at once. Not here: what the rows mean (keys.py, quota.py).
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sql
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql, sqlite

from freehold.errors import BadInput, DatabaseFailed

MIGRATIONS = Path(__file__).parent / "migrations"
NUM_THREADS = 4
BUSY_S = 30  # so long a writer waits for another one
CONNECT_S = 10
UPGRADE_LOCK = 0x667265686F6C64  # any number, but the same for all who would upgrade one PostgreSQL database

Given = ParamSpec("Given")
Result = TypeVar("Result")


metadata = sql.MetaData()
api_keys = sql.Table(
    "api_keys",
    metadata,
    sql.Column("id", sql.String(16), primary_key=True),
    sql.Column("secret_sha256", sql.LargeBinary(32), nullable=False),
    sql.Column("name", sql.String(100), nullable=False),
    sql.Column("scopes", sql.String(100), nullable=False),
    sql.Column("expires_at", sql.DateTime(timezone=True)),
    sql.Column("requests_per_minute", sql.BigInteger),
    sql.Column("concurrency", sql.BigInteger),
    sql.Column("tokens_per_day", sql.BigInteger),
    sql.Column("weight", sql.Float(53), nullable=False),
    sql.Column("created_at", sql.DateTime(timezone=True), nullable=False),
    sql.Column("revoked_at", sql.DateTime(timezone=True)),
)
key_usage = sql.Table(
    "key_usage",
    metadata,
    sql.Column("key_id", sql.ForeignKey("api_keys.id"), primary_key=True),
    sql.Column("day", sql.Date, primary_key=True),
    sql.Column("num_requests", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("prompt_tokens", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("completion_tokens", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("reserved_tokens", sql.BigInteger, nullable=False, server_default="0"),
)


class Database:
    """A database with its tables as this version wants them. Raises: BadInput where it cannot be opened as one."""

    def __init__(self, url: str):
        parsed = _parsed(url)
        shown = parsed.render_as_string(hide_password=True)
        self._engine = _engine(parsed)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="freehold-database")
        try:
            self._upgrade()
        except CommandError:
            self.close()
            raise BadInput(
                f"{shown} holds the tables of a newer Freehold", hint="update Freehold, or name another database"
            ) from None
        except sql.exc.SQLAlchemyError as error:
            self.close()
            raise BadInput(f"the database {shown} cannot be used: {_first_line(error)}") from None

    @contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """Yield a connection within a transaction, which holds unless an error leaves it. Raises: DatabaseFailed."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except sql.exc.SQLAlchemyError as error:
            raise DatabaseFailed(f"the database of keys does not work: {_first_line(error)}") from error

    async def call(self, function: Callable[Given, Result], *positional: Given.args, **named: Given.kwargs) -> Result:
        """Return a function's result; it runs in a thread, so that the event loop does not wait for a disk."""
        call = partial(function, *positional, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def insert_missing(self, table: sql.Table, values: dict[str, Any]) -> sql.Executable:
        """Return the statement that adds a row unless its primary key is there already."""
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        return insert(table).values(values).on_conflict_do_nothing()

    def close(self) -> None:
        """Let connections and threads go, after the calls that run."""
        self._threads.shutdown()
        self._engine.dispose()

    def _upgrade(self) -> None:
        config = Config()
        # % would start an interpolation of configparser
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        head = ScriptDirectory.from_config(config).get_current_head()
        with self._engine.connect() as connection:
            if MigrationContext.configure(connection).get_current_revision() == head:
                return  # without the lock: opening waits for nobody who writes
        with self._engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            else:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")  # who waited for the lock finds it done
            connection.commit()


def _parsed(url: str) -> sql.URL:
    try:
        parsed = sql.make_url(url)
    except sql.exc.ArgumentError:
        raise BadInput(
            "the database is not named by a URL", hint="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    kind = parsed.drivername.split("+")[0]
    if kind in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise BadInput(f"the database is of the kind {kind!r}", hint="use sqlite:///FILE or postgresql://")
    if parsed.database in (None, "", ":memory:"):
        raise BadInput("a database in memory forgets its keys", hint="name a file: sqlite:///FILE")
    return parsed.set(drivername="sqlite+pysqlite")


def _engine(url: sql.URL) -> sql.Engine:
    pool = {"pool_size": NUM_THREADS, "max_overflow": 2}
    if url.get_backend_name() == "postgresql":
        try:
            return sql.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_S}, **pool)
        except ModuleNotFoundError as error:
            raise BadInput(
                f"{error.name}, which PostgreSQL needs, is not installed", hint="pip install 'freehold[postgres]'"
            ) from None
    _create_file(Path(str(url.database)))
    engine = sql.create_engine(url, connect_args={"timeout": BUSY_S}, **pool)
    sql.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _create_file(path: Path) -> None:
    """Make the file of a SQLite database, for its owner's eyes only; SQLite gives its side files the same rights."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise BadInput(f"the database {path} cannot be opened: {error.strerror}") from None


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
    connection.execute("PRAGMA synchronous = FULL")  # what was committed outlives a loss of power
    connection.execute("PRAGMA foreign_keys = ON")


def _first_line(error: Exception) -> str:
    """Return what the driver says, without the statement and its values that SQLAlchemy adds."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
