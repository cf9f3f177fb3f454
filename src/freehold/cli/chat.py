"""`freehold chat`: a conversation in the terminal, with its history and its few commands."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.progress import after_waiting
from freehold.cli.report import show_error
from freehold.cli.run import note_cut
from freehold.cli.terminal import AnswerWriter, show_note
from freehold.engine.request import SamplingParams
from freehold.errors import BadInput, BadRequest

if TYPE_CHECKING:
    from freehold.engine.model import Model
    from freehold.text.answer import Piece

COMMANDS = """\
/reset        forget the conversation, keep the system message
/system TEXT  tell the model something before the conversation; without TEXT nothing
/save FILE    write the conversation to a new JSON file
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer; what was said stays in the conversation. A space before / makes it part of a message."""


def chat(
    model: options.ModelOrDefault = options.DEFAULT_MODEL,
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
) -> None:
    """Talk with a model; it sees the whole conversation each time.

    Answers stream to stdout; reasoning and, after each answer, its speed go to stderr. Ctrl-C stops an answer, Ctrl-D
    or /exit leaves, /help lists the commands. Lines from a pipe are messages too.

    Examples:

    \b
      freehold chat
      freehold chat smollm2-135m-instruct
      freehold chat model.gguf --system "Answer in one sentence." --temperature 0.7
      printf 'Hello\\n/save talk.json\\n' | freehold chat ./folder
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
    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, threads=threads)
    if loaded.text.template is None:
        raise BadRequest("this model has no chat template", hint=f"it continues text: freehold run {model} PROMPT")
    conversation = Conversation(model_name=model, system=system)
    if sys.stdin.isatty():
        show_note(f"{model}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    for line in typed_lines():
        if line.rstrip() == "/exit":
            return
        if line.startswith("/"):
            obey(conversation, line.rstrip())
        elif line.strip():
            answer(loaded, conversation, line.strip(), sampling)


@dataclass(kw_only=True)
class Conversation:
    """What was said so far, as a chat template takes it."""

    model_name: str
    system: str | None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system message, if there is one, and the turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def save(self, path: Path) -> None:
        """Write the conversation to a new file."""
        content = {"model": self.model_name, "messages": self.messages}
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise BadInput(f"{path.name} exists already", hint="name another file") from None
        except OSError as error:
            raise BadInput(f"{path.name} cannot be written: {error.strerror}") from None


def typed_lines() -> Iterator[str]:
    """Yield the lines of a person, with line editing and history where there is such a library, or of a pipe.

    Raises: BadRequest where a pipe holds no UTF-8 text; a person may type the line again.
    """
    if not sys.stdin.isatty():
        yield from _piped_lines()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it is what gives `input` line editing)
    while True:
        try:
            line = input("> ")
            line.encode()
        except EOFError:
            show_note("")
            return
        except KeyboardInterrupt:
            show_note("\nCtrl-D or /exit leaves")
            continue
        except UnicodeError:
            show_error("BadRequest", "this line is not UTF-8 text")
            continue
        yield line


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            line.encode()  # where the locale is C, Python reads what is no UTF-8 as surrogates
            yield line.rstrip("\n")
    except UnicodeError:
        raise BadRequest("standard input is not UTF-8 text") from None


def obey(conversation: Conversation, line: str) -> None:
    """Follow a command of the user. Mutates: conversation."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/reset":
            conversation.turns.clear()
            show_note("the conversation is forgotten")
        case "/system":
            conversation.system = argument or None
            show_note("the system message is set" if argument else "there is no system message now")
        case "/save" if argument:
            try:
                conversation.save(Path(argument).expanduser())
                show_note(f"saved to {argument}")
            except BadInput as error:
                show_error(type(error).__name__, error.message, error.hint)
        case "/save":
            show_error("BadRequest", "/save wants the name of a file", "/save talk.json")
        case "/help":
            show_note(COMMANDS)
        case _:
            show_error("BadRequest", f"{line!r} is no command", "/help lists them")


def answer(loaded: "Model", conversation: Conversation, question: str, sampling: SamplingParams) -> None:
    """Show the model's answer as it comes, then its speed. Mutates: conversation."""
    from freehold.engine.model import Usage

    conversation.turns.append({"role": "user", "content": question})
    usage, is_stopped = Usage(), False
    heard: list[Piece] = []
    writer = AnswerWriter()
    try:
        pieces = loaded.chat_stream(conversation.messages, sampling=sampling, usage=usage)
        for piece in after_waiting("Reading the conversation", pieces):
            heard.append(piece)
            writer.show(piece)
        writer.finish()
    except KeyboardInterrupt:
        is_stopped = True
        writer.finish()
    except BadInput as error:  # a conversation that has outgrown the context, or that the template refuses
        show_error(type(error).__name__, error.message, error.hint or "/reset begins anew")
    remember(conversation, heard)
    if not is_stopped:
        note_cut(usage, sampling.max_tokens)
    if usage.completion_tokens:
        speed = f"{usage.decode_tokens_per_s:.1f} tokens/s, first after {usage.prefill_s:.2f} s"
        show_note(f"[{usage.completion_tokens} tokens, {speed}{', stopped' if is_stopped else ''}]")
    elif is_stopped:
        show_note("[stopped before the first token; the question is withdrawn]")


def remember(conversation: Conversation, heard: list["Piece"]) -> None:
    """Add what the model said, however little, to the turns; a question without any answer is withdrawn.

    Mutates: conversation.
    """
    from freehold.text.answer import join_pieces

    said = join_pieces(heard)
    if not (said.text or said.reasoning):
        conversation.turns.pop()
        return
    reasoning = {"reasoning_content": said.reasoning} if said.reasoning else {}
    conversation.turns.append({"role": "assistant", "content": said.text, **reasoning})
