"""Arguments and options that several commands share, so that one thing has one name, one default and one help text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["bf16", "f16", "f32"]
# Short for the names of checkpoint/dtypes.py.
DTYPE_NAMES: dict[Dtype, str] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

MAX_THREADS = 255  # as many as the kernels' pool takes (native/pool.h)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with safetensors, a .safetensors or .gguf file, or the name of a fetched model.",
        show_default=False,
    ),
]
DEFAULT_MODEL = "freehold-pico"
ModelOrDefault = Annotated[
    str, typer.Argument(metavar="MODEL", help="As elsewhere; without it freehold-pico, which came with Freehold.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest answer in tokens. Without it an answer may fill the model's context.", show_default=False
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher draws more freely.")]
TopK = Annotated[int, typer.Option(help="Draw among this many of the likeliest tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that have this probability together.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
Seed = Annotated[int, typer.Option(help="What decides the draws: the same seed, the same answer.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends an answer and is not part of it; may be given again.", show_default=False),
]
System = Annotated[
    str | None, typer.Option(help="System message: what the model is told before the conversation.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
LoadDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="What the weights are held in. Without it the stored one if the weights are plain; quantized weights stay "
        "as they are stored on a CPU, and become bf16 elsewhere.",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="Folder of an adapter in PEFT's format: the answers are the adapted model's.", show_default=False
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_THREADS,
        help="CPU threads. Without it, one for each core that this process or its container may use.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
NewFolder = Annotated[
    Path, typer.Argument(metavar="DEST", help="A folder that does not exist yet.", show_default=False)
]
