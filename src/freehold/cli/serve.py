"""`freehold serve`: one model for many, under the APIs of OpenAI and Anthropic, and as a page."""

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.keys import DatabaseUrl
from freehold.cli.loading import load_opened_model, open_model
from freehold.cli.numbers import bytes_text
from freehold.cli.progress import waiting
from freehold.cli.starting import import_torch, starting
from freehold.cli.terminal import show_line, show_note
from freehold.errors import BadInput
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.checkpoint.load import Described
    from freehold.engine.model import Model
    from freehold.engine.plan import ServingPlan
    from freehold.serve.keys import Keys
    from freehold.serve.log import Form
    from freehold.serve.quota import DatabaseQuotas

MemoryGb = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="GB for the whole process. Without it, half of what is free beside the weights goes to states.",
        show_default=False,
    ),
]
LogForm = Annotated[
    Literal["text", "json", "quiet"], typer.Option(help="A line for each request on stderr, or for failures only.")
]


def serve(
    model: options.ModelOrDefault = options.DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine, every request needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. Without it, its own.", show_default=False)
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which it answers; may be given again.", show_default=False),
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, max=1024, help="Requests that run at once.")] = 64,
    context: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt and answer together.", show_default=False)
    ] = None,
    memory: MemoryGb = None,
    kv_dtype: Annotated[
        Literal["int8"] | None,
        typer.Option(help="int8 halves keys and values or better, and rounds them.", show_default=False),
    ] = None,
    budget_tokens: Annotated[int, typer.Option(min=1, max=65536, help="Tokens computed in a step, at most.")] = 512,
    require_keys: Annotated[bool, typer.Option("--require-keys", help="Ask for keys on loopback too.")] = False,
    database: DatabaseUrl = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers may take to end after SIGTERM.")] = 30.0,
    log: LogForm = "text",
    adapter: options.Adapter = None,
    dtype: options.LoadDtype = None,
    threads: options.Threads = None,
) -> None:
    """Serve a model to any OpenAI or Anthropic client, and as a chat page.

    On this machine alone no key is needed. Elsewhere every request needs one: make it with `freehold keys add NAME`.
    SIGTERM or Ctrl-C ends what runs, or cuts it after --drain seconds.

    Examples:

    \b
      freehold serve
      freehold serve smollm2-135m-instruct
      freehold serve model.gguf --host 0.0.0.0 --port 8080 --max-sequences 16
      freehold serve model.gguf --name ours --alias gpt-4o-mini
    """
    plan_of = partial(
        _plan,
        adapter=adapter,
        dtype=dtype,
        max_sequences=max_sequences,
        context=context,
        memory=memory,
        kv_dtype=kv_dtype,
        budget_tokens=budget_tokens,
    )
    with _listen(host, port) as listening:
        with starting() as beside:
            loaded, plan = _load(model, plan_of, adapter=adapter, dtype=dtype, threads=threads, beside=beside)
        keys_url = (database or Settings().database_url) if require_keys or not _is_loopback(host) else None
        names = (name or _name_of(model), *(alias or ()))
        asyncio.run(_serve(loaded, plan, listening, names=names, keys_url=keys_url, drain_s=drain, log=log))


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; before anything is loaded, so that a taken port is told at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise BadInput(
            f"cannot listen on {host}:{port}: {error.strerror or error}", hint="choose another --host or --port"
        ) from None


def _is_loopback(host: str) -> bool:
    from freehold.serve.auth import is_loopback

    return is_loopback(host)


def _name_of(model: str) -> str:
    return Path(model).stem if model.endswith((".gguf", ".safetensors")) else Path(model).name


def _load(
    model: str,
    plan_of: "Callable[[Described], ServingPlan]",
    *,
    adapter: Path | None,
    dtype: options.Dtype | None,
    threads: int | None,
    beside: Executor,
) -> "tuple[Model, ServingPlan]":
    """Return a model and its plan, which is shown before any weight is read.

    beside: imports the server while kernels pack the weights.
    """
    path = find(model, Settings().models_dir)  # before torch: a name that is not known should not take seconds
    import_torch(beside)
    source, described = open_model(path)
    with source:
        plan = plan_of(described)
        _show_plan(plan)
        beside.submit(import_module, "freehold.serve.app")
        beside.submit(import_module, "freehold.serve.connection")
        return load_opened_model(source, described, device="cpu", dtype=dtype, threads=threads, adapter=adapter), plan


def _plan(
    described: "Described",
    *,
    adapter: Path | None,
    dtype: options.Dtype | None,
    max_sequences: int,
    context: int | None,
    memory: float | None,
    kv_dtype: str | None,
    budget_tokens: int,
) -> "ServingPlan":
    """Return the plan of a model that has not been loaded, from its headers."""
    import torch

    from freehold.checkpoint.dtypes import parse_dtype
    from freehold.checkpoint.load import default_dtype
    from freehold.engine.adapter import adapter_bytes
    from freehold.engine.machine import main_memory
    from freehold.engine.plan import need_as_stored, need_of, serving_plan

    chosen = parse_dtype(options.DTYPE_NAMES[dtype]) if dtype else default_dtype(described, torch.device("cpu"))
    need = (None if dtype else need_as_stored(described)) or need_of(described.spec, chosen)
    return serving_plan(
        described.spec,
        weight_bytes=need.weight_bytes + (adapter_bytes(adapter) if adapter else 0),
        dtype=chosen,
        memory_bytes=int(memory * 1e9) if memory else None,
        free_bytes=main_memory().available_bytes,
        num_sequences=max_sequences,
        context=context,
        kv_dtype=torch.int8 if kv_dtype else None,
        budget_tokens=budget_tokens,
    )


def _show_plan(plan: "ServingPlan") -> None:
    from freehold.engine.plan import PROGRAM_BYTES

    limits = plan.limits
    parts = {
        "weights": plan.weight_bytes,
        "keys and values": plan.kv_bytes,
        "recurrent states": plan.recurrent_bytes,
        "steps": plan.step_bytes,
        "bodies of requests": plan.bodies_bytes,
        "the program": PROGRAM_BYTES,
    }
    memory = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items() if size)
    show_note(f"memory: {memory}; in all {bytes_text(plan.total_bytes)}")
    show_note(f"{limits.num_slots} requests at once, up to {limits.longest:,} tokens each")
    for note in plan.notes:
        show_note(f"note: {note}")


async def _serve(
    loaded: "Model",
    plan: "ServingPlan",
    listening: socket.socket,
    *,
    names: Sequence[str],
    keys_url: str | None,
    drain_s: float,
    log: "Form",
) -> None:
    from freehold.engine.engine import Engine
    from freehold.serve.answers import Answers
    from freehold.serve.app import build_app
    from freehold.serve.auth import Guard
    from freehold.serve.configuration import ServeSettings
    from freehold.serve.connection import serve_until_stopped
    from freehold.serve.limits import Limits
    from freehold.serve.log import written

    keys, quotas = _open_keys(keys_url) if keys_url else (None, None)
    with written(log, sys.stderr), Engine(loaded, plan.limits, kv_dtype=plan.kv_dtype) as engine:
        model_name, *aliases = names
        answers = Answers(engine, model_name=model_name, quotas=quotas)
        settings = ServeSettings(aliases=tuple(aliases), limits=Limits(all_bodies_bytes=plan.bodies_bytes))
        app = build_app(answers, guard=Guard(keys), settings=settings)
        host, port = listening.getsockname()[:2]
        show_line(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        await serve_until_stopped(app, engine, listening, drain_s=drain_s)
        answers.close()
    if keys:
        keys.database.close()


def _open_keys(url: str) -> tuple["Keys", "DatabaseQuotas"]:
    """Return the keys of a database, and their quotas."""
    with waiting("Opening the database of keys"):
        from freehold.serve.database import Database
        from freehold.serve.keys import Keys
        from freehold.serve.quota import DatabaseQuotas

        keys = Keys(Database(url))
    if not keys.all():
        show_note("note: every request needs an API key and there is none: make one with `freehold keys add NAME`")
    return keys, DatabaseQuotas(keys.database)
