"""A real server as a process of its own, under `python -O`, that writes down whatever Python's audit hooks tell.

Under -O, for then no check by `assert` is left: what holds here, holds everywhere.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from cli.commands import TIMEOUT_S, spawn
from freehold.serve.database import Database
from freehold.serve.keys import Keys
from freehold.serve.terms import Terms

# What runs code, starts programs, or reaches out. https://docs.python.org/3/library/audit_events.html
RUNS_CODE = ("exec", "compile", "import", "marshal.loads", "pickle.find_class", "ctypes.dlopen")
STARTS_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")
REACHES_OUT = (
    *("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"),
    *("socket.gethostbyaddr", "socket.getnameinfo", "urllib.Request", "http.client.connect", "ftplib.connect"),
    *("smtplib.connect", "imaplib.open", "poplib.connect", "telnetlib.Telnet.open"),
)
LONGEST_S = 1800.0  # for all tests of a busy machine
AUDITED = (*RUNS_CODE, *STARTS_PROGRAMS, *REACHES_OUT, "open", "socket.bind")

# Writes a line of JSON for each audited event to the file that the first argument names.
HOOK = f"""
import json, os, sys
audited, log = set({AUDITED!r}), os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def told(value):
    return value.co_filename if hasattr(value, "co_filename") else repr(value)[:500]
def hook(event, values):
    if event in audited:
        kept = values[1:] if event == "compile" else values[:2]  # a file's name, not its source
        os.write(log, (json.dumps([event, *map(told, kept)]) + "\\n").encode())
sys.addaudithook(hook)
"""
START = f"{HOOK}from freehold.cli.main import main; main()"


@dataclass(frozen=True, kw_only=True)
class Act:
    """Something that a process did: the name of an audit event, and its first values as text."""

    event: str
    values: tuple[str, ...]


def acts_in(log: Path) -> list[Act]:
    """Return what a process has written down."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Act(event=event, values=tuple(values)) for event, *values in lines]


@dataclass(frozen=True, kw_only=True)
class Witnessed:
    """A server of the model in a folder, and a client of it that has a key for everything.

    log: its acts. notes: what it wrote to stderr. keys: where keys can be made for it.
    """

    client: httpx.Client
    keys: Keys
    folder: Path
    log: Path
    notes: Path

    def acts(self) -> list[Act]:
        return acts_in(self.log)

    def ask(self, path: str, body: object = None, **more: object) -> httpx.Response:
        """Return the answer to a POST with a body, to a GET without."""
        return self.client.get(path, **more) if body is None else self.client.post(path, json=body, **more)


@contextmanager
def witnessed_server(folder: Path, into: Path) -> Iterator[Witnessed]:
    """Yield a server of the model in a folder, which asks for keys. into: where its log and its keys are kept."""
    log, notes, url = into / "acts", into / "notes", f"sqlite:///{into / 'keys.db'}"
    with closing(Database(url)) as database, notes.open("w") as errors:
        keys = Keys(database)
        _, token = keys.add("all", Terms(scopes=frozenset({"infer", "metrics", "admin"})))
        arguments = (log, "serve", folder, "--port", 0, "--memory", 2, "--require-keys", "--database", url)
        files = {"stdout": subprocess.PIPE, "stderr": errors}
        with spawn(*arguments, start=START, flags=("-O",), lives_s=LONGEST_S, **files) as process:
            address = process.stdout.readline().strip()
            assert address, notes.read_text()
            key = {"x-api-key": token}
            with httpx.Client(base_url=address, headers=key, timeout=TIMEOUT_S, trust_env=False) as client:
                yield Witnessed(client=client, keys=keys, folder=folder, log=log, notes=notes)
            process.terminate()
