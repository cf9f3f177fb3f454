"""`freehold inspect`: what a model is and what it takes, from its headers alone."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.numbers import bytes_text, count_text
from freehold.cli.progress import waiting
from freehold.cli.terminal import show_json, show_line, show_table
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.checkpoint.load import Described
    from freehold.engine.machine import Memory
    from freehold.engine.plan import Need, Part
    from freehold.models.spec import DecoderSpec

PATTERN_WIDTH = 72
LEGEND = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "experts"}
PLANNED: tuple[options.Dtype, ...] = ("bf16", "f32")  # f16 takes what bf16 does
DOES_NOT_FIT = "-"


def inspect(model: options.ModelName, device: options.Device = "cpu", as_json: options.Json = False) -> None:
    """Show what a model is, and how much of it fits this machine.

    Only headers are read: a file of 100 GB takes no longer than a small one. Its family, its blocks as a line, its
    parameters (all, and those that one token meets), its bytes by part and by storage format, its states, and how
    many sequences fit at which context. A config.json without weights will do.

    Examples:

    \b
      freehold inspect smollm2-135m-instruct
      freehold inspect ./Nemotron-3-Nano/config.json
      freehold inspect model.gguf --json --device cuda
    """
    path = find(model, Settings().models_dir)
    with waiting("Starting"):
        from freehold.engine.model import parse_device
    seen = look_into(path)
    from freehold.engine.machine import memory_of

    memory = memory_of(parse_device(device))
    if as_json:
        show_json(_plain(seen, memory))
    else:
        _show(seen, memory, device)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What can be known of a model without reading a weight.

    formats: bytes in the file by storage format, empty without a file.
    """

    file: str
    family: str
    spec: "DecoderSpec"
    parts: "list[Part]"
    formats: dict[str, int]
    needs: "list[Need]"
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_active(self) -> int:
        return sum(part.num_active for part in self.parts)


def look_into(path: Path) -> Inspection:
    """Return what the headers of a checkpoint say, or its config.json where that alone is given."""
    from freehold.checkpoint.dtypes import parse_dtype
    from freehold.checkpoint.load import open_described
    from freehold.engine.plan import count_parts, need_as_stored, need_of

    described: Described | None = None
    if path.name == "config.json":
        family, spec = _read_config(path)
    else:
        source, described = open_described(path)
        source.close()
        family, spec = described.family.name, described.spec
    needs = [need_of(spec, parse_dtype(options.DTYPE_NAMES[dtype])) for dtype in PLANNED]
    as_stored = need_as_stored(described) if described else None
    return Inspection(
        file=path.resolve().name if described else path.resolve().parent.name,
        family=family,
        spec=spec,
        parts=count_parts(spec, described),
        formats=_bytes_by_format(described) if described else {},
        needs=[as_stored, *needs] if as_stored else needs,
        notes=described.notes if described else ("a config without weights: nothing was matched",),
    )


def _read_config(path: Path) -> "tuple[str, DecoderSpec]":
    from freehold.checkpoint.safetensors import parse_json_object
    from freehold.models.families import family_of_config

    config = parse_json_object(path.read_bytes(), file=path.name)
    family = family_of_config(config)
    return family.name, family.read_config(config)


def _bytes_by_format(described: "Described") -> dict[str, int]:
    counted: Counter[str] = Counter()
    for match in described.matches.matches:
        for tensor in match.stored:
            counted[tensor.format] += tensor.num_bytes
    return dict(counted.most_common())


def _show(seen: Inspection, memory: "Memory", device: str) -> None:
    from freehold.models.spec import block_pattern

    spec, pattern = seen.spec, block_pattern(seen.spec.blocks)
    show_line(f"{seen.file}: {seen.family}, context {spec.max_positions:,}")
    show_line(f"{len(spec.blocks)} blocks of width {spec.width:,}, vocabulary {spec.vocab_size:,}")
    for line in wrap(pattern, PATTERN_WIDTH, break_on_hyphens=False):
        show_line(f"  {line}")
    counts = ", ".join(f"{count} {LEGEND[letter]} ({letter})" for letter, count in Counter(pattern).items())
    show_line(f"  {counts}")
    show_line(f"{count_text(seen.num_parameters)} parameters, of which a token meets {count_text(seen.num_active)}")
    for note in seen.notes:
        show_line(f"note: {note}")
    show_line()
    _show_parts(seen)
    show_line()
    _show_plan(seen, memory, device)


def _show_parts(seen: Inspection) -> None:
    def stored(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else bytes_text(num_bytes)

    rows = [(p.name, f"{p.num_parameters:,}", f"{p.num_active:,}", stored(p.stored_bytes)) for p in seen.parts]
    show_table([("part", "parameters", "per token", "stored"), *rows])
    if seen.formats:
        formats = ", ".join(f"{name} {bytes_text(num_bytes)}" for name, num_bytes in seen.formats.items())
        show_line(f"stored: {bytes_text(sum(seen.formats.values()))} ({formats})")


def _show_plan(seen: Inspection, memory: "Memory", device: str) -> None:
    from freehold.engine.plan import RESERVED_BYTES, contexts_up_to

    show_table(
        [
            ("in memory", *(need.dtype for need in seen.needs)),
            ("weights", *(bytes_text(need.weight_bytes) for need in seen.needs)),
            ("recurrent state of a sequence", *(bytes_text(n.recurrent_bytes_per_sequence) for n in seen.needs)),
            ("keys and values of a token", *(bytes_text(need.kv_bytes_per_token) for need in seen.needs)),
        ]
    )
    show_line()
    total, available = bytes_text(memory.total_bytes), bytes_text(memory.available_bytes)
    show_line(f"this machine's {device} has {total}, {available} of it available")
    show_line(f"sequences at once beside the weights, {bytes_text(RESERVED_BYTES)} kept for the rest:")
    rows = [("context", *(need.dtype for need in seen.needs))]
    for context in contexts_up_to(seen.spec.max_positions):
        fitting = [need.sequences_in(memory.available_bytes, context) for need in seen.needs]
        rows.append((f"{context:,}", *(DOES_NOT_FIT if n < 0 else f"{n:,}" for n in fitting)))
    show_table(rows)


def _plain(seen: Inspection, memory: "Memory") -> dict[str, Any]:
    """Return everything for JSON."""
    from freehold.engine.plan import RESERVED_BYTES, contexts_up_to
    from freehold.models.spec import block_pattern

    contexts = contexts_up_to(seen.spec.max_positions)
    plan = [
        asdict(need)
        | {
            "sequences": {
                str(context): max(0, need.sequences_in(memory.available_bytes, context)) for context in contexts
            }
        }
        | {"weights_fit": need.sequences_in(memory.available_bytes, 0) >= 0}
        for need in seen.needs
    ]
    return {
        "file": seen.file,
        "family": seen.family,
        "pattern": block_pattern(seen.spec.blocks),
        "width": seen.spec.width,
        "vocab_size": seen.spec.vocab_size,
        "max_positions": seen.spec.max_positions,
        "num_parameters": seen.num_parameters,
        "num_active": seen.num_active,
        "parts": [asdict(part) for part in seen.parts],
        "stored_bytes_by_format": seen.formats,
        "notes": list(seen.notes),
        "memory": asdict(memory) | {"reserved_bytes": RESERVED_BYTES},
        "plan": plan,
    }
