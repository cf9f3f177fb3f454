"""`freehold data`: what a model is trained on, looked at and put into tokens."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import options
from freehold.cli.loading import load_tokenizer
from freehold.cli.numbers import bytes_text, count_text
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_json, show_line, show_marked, show_table
from freehold.errors import BadInput

if TYPE_CHECKING:
    from freehold.train.chat_examples import Supervision
    from freehold.train.counts import Counts
    from freehold.train.inspection import Inspection

app = typer.Typer(name="data", rich_markup_mode=None, add_completion=False)

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="Whose tokenizer and chat template: a folder, a file or a name.", show_default=False
    ),
]
WithoutReasoning = Annotated[
    bool, typer.Option("--without-reasoning", help="Leave the assistant's reasoning out of what is trained on.")
]
WithoutToolCalls = Annotated[
    bool, typer.Option("--without-tool-calls", help="Leave turns that call tools out of what is trained on.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="A key of rows that is left out; may be given again.", show_default=False),
]


@app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    """Look at training data, and turn it into tokens once.

    A file is .jsonl or .parquet, each row with `text`, or with `messages` and perhaps `tools`; or a .txt file, which
    is one document. Of conversations the assistant's turns are trained on, each to its end; of texts, everything.

    Examples:

    \b
      freehold data inspect chats.jsonl --model smollm2-135m-instruct
      freehold data build chats.jsonl --model smollm2-135m-instruct --out ./chats
    """
    if context.invoked_subcommand is None:
        show_line(context.get_help())


@app.command()
def build(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What to read.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that does not exist yet.", show_default=False)],
    without_reasoning: WithoutReasoning = False,
    without_tool_calls: WithoutToolCalls = False,
    ignore: Ignore = None,
    as_json: options.Json = False,
) -> None:
    """Turn files into a data set: tokens and what of them is trained on, in a folder of shards.

    A build that was stopped, by Ctrl-C or a full disk, goes on after its last whole shard when the same command is
    given again. The same files give the same bytes, but where a template writes the day.

    Examples:

    \b
      freehold data build chats.jsonl more.parquet --model smollm2-135m-instruct --out ./chats
      freehold data build book.txt --model ./Nemotron-3-Nano --out ./book
    """
    tokenizer, template = load_tokenizer(model)
    with waiting("Starting"):
        from freehold.train.build import build_dataset
    with bytes_bar(f"Building {out.name}") as progress:
        dataset = build_dataset(
            files,
            out,
            tokenizer=tokenizer,
            template=template,
            supervision=_supervision(without_reasoning, without_tool_calls),
            ignored=frozenset(ignore or ()),
            progress=progress,
        )
    size, num_shards = sum(file.stat().st_size for file in out.iterdir()), len(dataset.shards)
    if as_json:
        show_json({"folder": str(out), "shards": num_shards, "digest": dataset.digest} | asdict(dataset.counts))
        return
    show_line(f"{out}: {bytes_text(size)} in {num_shards} {'shard' if num_shards == 1 else 'shards'}")
    _show_counts(dataset.counts)
    show_line(f"SHA-256 {dataset.digest}  plan and shards")


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="Rows, or a data set that was built.", show_default=False)
    ],
    model: Model,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of sequences in training, at which conversations are cut.", show_default=False
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many documents to show, the first ones.")] = 3,
    without_reasoning: WithoutReasoning = False,
    without_tool_calls: WithoutToolCalls = False,
    ignore: Ignore = None,
    as_json: options.Json = False,
) -> None:
    """Show what of some data is trained on, and count what could go wrong.

    What is trained on is green on a terminal, and in brackets elsewhere. All rows are read, and the first one that
    cannot be used is named. Of a data set each byte is compared with its digest; how it was masked was said when it was
    built.

    Examples:

    \b
      freehold data inspect chats.jsonl --model smollm2-135m-instruct --show 1
      freehold data inspect ./chats --model smollm2-135m-instruct --max-tokens 2048 --json
    """
    tokenizer, template = load_tokenizer(model)
    with waiting("Starting"):
        from freehold.train.build import read_all
        from freehold.train.dataset import Dataset
        from freehold.train.inspection import inspect_dataset, inspect_rows
        from freehold.train.tokenized import DocumentTokenizer
    if path.is_dir():
        if without_reasoning or without_tool_calls or ignore:
            raise BadInput(f"{path.name} is built already: what is left out of it was said then")
        dataset = Dataset(path)
        dataset.check_model(tokenizer, template)
        with waiting("Comparing digests"):
            seen = inspect_dataset(dataset, tokenizer, max_tokens=max_tokens, num_shown=show)
    else:
        supervision = _supervision(without_reasoning, without_tool_calls)
        converter = DocumentTokenizer(tokenizer, template, supervision)
        with bytes_bar(f"Reading {path.name}") as progress:
            rows = read_all([path], ignored=frozenset(ignore or ()), progress=progress)
            seen = inspect_rows(rows, converter, tokenizer, max_tokens=max_tokens, num_shown=show)
    if as_json:
        show_json(_plain(seen, max_tokens))
    else:
        _show(seen, max_tokens)


def _supervision(without_reasoning: bool, without_tool_calls: bool) -> "Supervision":
    from freehold.train.chat_examples import Supervision

    return Supervision(reasoning=not without_reasoning, tool_calls=not without_tool_calls)


def _show(seen: "Inspection", max_tokens: int | None) -> None:
    for number, runs in enumerate(seen.shown, start=1):
        show_line(f"--- document {number}")
        show_marked(runs)
        show_line()
    if seen.shown:
        show_line()
    _show_counts(seen.counts)
    if max_tokens is not None:
        show_line(
            f"  at {max_tokens:,} tokens: {seen.num_cut:,} conversations are cut, "
            f"{seen.num_left_out:,} left out, for their first answer lies behind the cut"
        )


def _show_counts(counts: "Counts") -> None:
    """Show counts; those of what could be wrong are shown where they are not zero."""
    share = counts.trained_tokens / counts.tokens
    rows = [
        (f"{counts.rows:,}", "rows"),
        (f"{counts.documents:,}", "documents"),
        (count_text(counts.tokens), f"tokens, {share:.1%} of them trained on"),
        (f"{counts.bos:,}", "BOS"),
        (f"{counts.eos:,}", "ends of a text or turn"),
    ]
    if counts.answers:
        same = counts.answers - counts.joined_answers
        rows.append((f"{counts.answers:,}", f"answers, {same:,} of them after exactly the ids that serving gives"))
    warnings = (
        (counts.untrained_rows, "rows left out: nothing in them is trained on"),
        (counts.split_rows, "rows in several documents: the template rewrites earlier turns"),
        (counts.inner_ends, "ends of a turn inside an answer"),
        (counts.unwritten_reasoning, "answers whose reasoning the template does not write"),
    )
    show_table([*rows, *((f"{count:,}", what) for count, what in warnings if count)], indent="  ")


def _plain(seen: "Inspection", max_tokens: int | None) -> dict[str, Any]:
    shown = [[{"text": text, "trained": is_trained} for text, is_trained in runs] for runs in seen.shown]
    cut = {"max_tokens": max_tokens, "cut": seen.num_cut, "left_out": seen.num_left_out}
    return asdict(seen.counts) | cut | {"shown": shown}
