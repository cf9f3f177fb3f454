"""How a command ends: its errors as one line with a hint on stderr, and its exit code.

0    done                                  2    what the user gave cannot be used
1    a check failed, or a bug (traceback)  130  Ctrl-C; what was begun is undone
"""

import sys
from collections.abc import Callable

import typer

from freehold.cli.terminal import printable
from freehold.errors import CheckFailed, FreeholdError, PeerFailed

CHECK_FAILED = 1
BAD_INPUT = 2


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Return the exit code of a command line that is run here; an error that a user can cause is shown, not raised."""
    try:
        return command() or 0
    except PeerFailed:  # which has been said
        return BAD_INPUT
    except FreeholdError as error:
        show_error(type(error).__name__, error.message, error.hint)
        return CHECK_FAILED if isinstance(error, CheckFailed) else BAD_INPUT
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        show_error("BadUsage", error.format_message(), f"{context.command_path if context else 'freehold'} --help")
        return BAD_INPUT
    except OSError as error:  # a full disk, a folder that must not be read: the machine's, not ours
        show_error(type(error).__name__, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        show_error(
            "OutOfMemory",
            str(error).split(". ")[0] or "memory is too small",
            "a smaller dtype takes less; `freehold inspect` plans",
        )
        return BAD_INPUT


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether a memory was too small: Python's, or torch's, of a GPU or of a CPU (a plain RuntimeError)."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or is_torchs


def show_error(kind: str, message: str, hint: str | None = None) -> None:
    """Write an error to stderr: what was seen and wanted in one line, the next step in another."""
    lines = [f"{kind}: {message}"] + ([f"hint: {hint}"] if hint else [])
    for line in lines:
        print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
