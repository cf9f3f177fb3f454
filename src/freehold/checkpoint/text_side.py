"""The text side of a checkpoint: tokenizer, chat template and dialect, read from its files or from GGUF metadata."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.checkpoint.load import Described
from freehold.checkpoint.safetensors import parse_json_object
from freehold.checkpoint.source import Source
from freehold.errors import BadFile
from freehold.text.chat import ChatTemplate
from freehold.text.dialect import Dialect, dialect_for
from freehold.text.tokenizer import Tokenizer

# Files that belong to the text side of a Hugging Face checkpoint and are copied as they are. No code is among them.
TEXT_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.jinja chat_template.json generation_config.json"
).split()


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """What turns text into ids and back. Each part is None where the checkpoint lacks it.

    files: the files that it was read from, none for GGUF.
    """

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    dialect: Dialect
    files: tuple[Path, ...]

    def write_files(self, folder: Path) -> None:
        """Put the text side into the folder of a Hugging Face checkpoint: copied, or written anew from GGUF."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if self.files or self.tokenizer is None:
            return
        self.tokenizer.to_files(folder, chat_template=self.template.source if self.template else None)
        stops = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": sorted(self.tokenizer.stop_ids)}
        (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")


def load_text_side(source: Source, described: Described) -> TextSide:
    """Return the text side of an open checkpoint.

    Raises: BadFile, UnsupportedModel where a tokenizer is there and cannot be used.
    """
    if source.kind != "gguf":
        return text_side_of_folder(source.folder, described.family.name)
    has_tokenizer = any(key.startswith("tokenizer.ggml.") for key in source.metadata)
    tokenizer = Tokenizer.from_gguf(source.metadata) if has_tokenizer else None
    return _text_side(tokenizer, source.metadata.get("tokenizer.chat_template"), described.family.name, files=())


def text_side_of_folder(folder: Path, family: str) -> TextSide:
    """Return the text side of a Hugging Face folder, which needs no weights, for a model of a family.

    Raises: BadFile, UnsupportedModel where a tokenizer is there and cannot be used.
    """
    files = tuple(folder / name for name in TEXT_FILES if (folder / name).is_file())
    tokenizer = Tokenizer.from_files(folder) if (folder / "tokenizer.json").is_file() else None
    return _text_side(tokenizer, _template_of(folder), family, files=files)


def _text_side(tokenizer: Tokenizer | None, template: Any, family: str, *, files: tuple[Path, ...]) -> TextSide:
    if template is not None and not isinstance(template, str):
        raise BadFile("the chat template is no text")
    return TextSide(
        tokenizer=tokenizer,
        template=_chat_template(template, tokenizer) if template else None,
        dialect=dialect_for(family, template),
        files=files,
    )


def _chat_template(template: str, tokenizer: Tokenizer | None) -> ChatTemplate:
    bos = tokenizer.token_text(tokenizer.bos_id) if tokenizer and tokenizer.bos_id is not None else None
    eos = tokenizer.token_text(tokenizer.eos_id) if tokenizer and tokenizer.eos_id is not None else None
    return ChatTemplate(template, bos_token=bos, eos_token=eos)


def _template_of(folder: Path) -> Any:
    """Return the chat template of a folder: its own file, or a key of tokenizer_config.json (the one named default)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadFile("chat_template.jinja is not UTF-8") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = parse_json_object((folder / name).read_bytes(), file=name).get("chat_template")
            if isinstance(template, list):
                templates = [entry for entry in template if isinstance(entry, dict)]
                template = next((entry.get("template") for entry in templates if entry.get("name") == "default"), None)
            if template is not None:
                return template
    return None
