"""The `freehold` command: its commands, and what holds for all of them. One file per command beside this one.

No torch here, nor in what this imports: `freehold --help` answers at once. The commands import it when they run, inside
their functions; that is the one reason for such imports in this folder.
"""

import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

import freehold
from freehold.cli.bench import bench
from freehold.cli.chat import chat
from freehold.cli.check import check
from freehold.cli.convert import convert
from freehold.cli.data import app as data
from freehold.cli.fetch import fetch
from freehold.cli.inspect import inspect
from freehold.cli.keys import app as keys
from freehold.cli.merge import merge
from freehold.cli.pack import pack
from freehold.cli.plan import plan
from freehold.cli.report import exit_code_of
from freehold.cli.run import run
from freehold.cli.serve import serve
from freehold.cli.terminal import show_line
from freehold.cli.train import train

TERMINATED = 128 + signal.SIGTERM

# Plain help: the same on every terminal, and quick. No completion: its installer would write to the user's shell files.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
for command in (run, chat, serve, fetch, inspect, convert, merge, pack, plan, train, check, bench):
    app.command()(command)
app.add_typer(keys)
app.add_typer(data)


@app.callback(invoke_without_command=True)
def freehold_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Own an open-weights language model: run it, look into it, convert it and check it, on your own machine.

    MODEL is a folder with safetensors, a .safetensors or .gguf file, or a name that `freehold fetch` has fetched.
    Nothing leaves this machine; only fetch uses a network.

    Start with:

    \b
      freehold fetch smollm2-135m-instruct
      freehold chat smollm2-135m-instruct

    Exit codes: 0 done, 1 a check failed, 2 something given cannot be used, 130 stopped by Ctrl-C.
    """
    if version:
        show_line(f"freehold {freehold.__version__}")
    elif context.invoked_subcommand is None:
        show_line(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))  # so that half-written files go
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark, not a traceback
    sys.exit(exit_code_of(lambda: app(arguments, prog_name="freehold", standalone_mode=False)))
