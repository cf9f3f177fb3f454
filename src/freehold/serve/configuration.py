"""What whoever runs the server decides about it. What a request may say is in schema.py."""

from dataclasses import dataclass, field
from pathlib import Path

from freehold.serve.limits import Limits

PAGE = Path(__file__).parent / "static"  # the files of the chat page
PAGE_PATHS = ("/", *sorted(f"/{file.name}" for file in PAGE.iterdir()))


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """aliases: further names of the model that requests may use. limits: of what requests may be.

    keep_alive_s: a stream in which nothing happens for so long gets a comment, so that nobody between cuts it.
    """

    aliases: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    keep_alive_s: float = 10.0
