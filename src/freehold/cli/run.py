"""`freehold run`: one question or one beginning of a text, and what the model makes of it.

Imports of torch, and of what needs it, are inside functions in this folder: `freehold --help` shall not wait for them.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.progress import after_waiting, waiting
from freehold.cli.terminal import AnswerWriter, show_json, show_note
from freehold.engine.request import SamplingParams
from freehold.errors import BadRequest

if TYPE_CHECKING:
    from freehold.engine.model import Model, Usage
    from freehold.text.answer import Piece


def run(
    model: options.ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, or - to read it from standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")] = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    adapter: options.Adapter = None,
    device: options.Device = "cpu",
    dtype: options.LoadDtype = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Ask a model one thing and print its answer as it comes.

    A model with a chat template is asked the prompt as one message of a user; a model without one continues it as text.
    The answer goes to stdout, reasoning to stderr. Ctrl-C ends it.

    Examples:

    \b
      freehold run smollm2-135m-instruct "What is the capital of France?"
      freehold run model.gguf --raw "Once upon a time" --max-tokens 64
      freehold run smollm2-135m-instruct "Who are you?" --adapter ./my-adapter
      freehold run ./folder - --temperature 0.7 --seed 1 --json < question.txt
    """
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    text = _read_stdin() if prompt == "-" else prompt
    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, threads=threads)
    asks = _asks_as_message(loaded, raw=raw, system=system)
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    from freehold.engine.model import Usage

    usage = Usage()
    if asks:
        pieces: Iterator[Piece] = loaded.chat_stream(messages, sampling=sampling, usage=usage)
    else:
        pieces = _text_pieces(loaded.stream(text, sampling=sampling, usage=usage))
    pieces = after_waiting("Reading the prompt", pieces)
    if as_json:
        show_json(_collected(loaded, list(pieces), usage))
    else:
        show_pieces(pieces)
        note_cut(usage, max_tokens)


def show_pieces(pieces: Iterator["Piece"]) -> None:
    """Show an answer as it comes; its last line is ended also where Ctrl-C stops it."""
    writer = AnswerWriter()
    try:
        for piece in pieces:
            writer.show(piece)
    finally:
        writer.finish()


def note_cut(usage: "Usage", max_tokens: int | None) -> None:
    """Say on stderr where an answer did not end by itself."""
    if usage.finish_reason == "length":
        limit = "--max-tokens" if usage.completion_tokens == max_tokens else "the model's context is full"
        show_note(f"[cut after {usage.completion_tokens} tokens: {limit}]")


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # where the locale is C, Python reads what is no UTF-8 as surrogates
        return text
    except UnicodeError:
        raise BadRequest("standard input is not UTF-8 text") from None


def _asks_as_message(loaded: "Model", *, raw: bool, system: str | None) -> bool:
    """Return whether the prompt is a message to the model, and not a text to continue."""
    has_template = loaded.text.template is not None
    if system and (raw or not has_template):
        reason = "--raw leaves the chat template out" if raw else "this model has no chat template"
        raise BadRequest(f"--system needs a chat template, and {reason}", hint="put it into the prompt")
    return has_template and not raw


def _text_pieces(texts: Iterator[str]) -> Iterator["Piece"]:
    from freehold.text.answer import TextPiece

    return (TextPiece(text=text) for text in texts)


def _collected(loaded: "Model", pieces: list["Piece"], usage: "Usage") -> dict[str, Any]:
    from freehold.text.answer import join_pieces

    answer = join_pieces(pieces)
    with waiting("Taking digests"):
        identity = asdict(loaded.identity)
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
        "usage": asdict(usage) | {"decode_tokens_per_s": usage.decode_tokens_per_s},
        "identity": identity,
    }
