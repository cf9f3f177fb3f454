"""The reference of the command line, docs/cli.md, made from the help that the commands themselves print.

python -m freehold.cli.reference > docs/cli.md
"""

import typer

from freehold.cli.main import app
from freehold.cli.terminal import show_text

WIDTH = 100  # of the help, whatever the terminal's
HEAD = """\
# The command line

What each command prints for `--help`. Made by `python -m freehold.cli.reference > docs/cli.md`; a test compares. Why
each option is there, and why its default is what it is, stands in [design-opinions.md](design-opinions.md).
"""


def render() -> str:
    """Return the help of `freehold` and of each of its commands as Markdown, the same in every environment."""
    group = typer.main.get_group(app)
    top = typer.Context(group, info_name="freehold", terminal_width=WIDTH, **group.context_settings)
    sections = [_section("freehold", top)]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=name, parent=top, terminal_width=WIDTH)
        sections.append(_section(f"freehold {name}", context))
        for inner, subcommand in getattr(command, "commands", {}).items():
            below = typer.Context(subcommand, info_name=inner, parent=context, terminal_width=WIDTH)
            sections.append(_section(f"freehold {name} {inner}", below))
    return "\n".join([HEAD, *sections])


def _section(title: str, context: typer.Context) -> str:
    text = "\n".join(line.rstrip() for line in context.command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    show_text(render())
