"""Text to token ids and back, for byte-level BPE: the tokenizers of Nemotron, Qwen and Llama 3.

The splitting and merging is the `tokenizers` library's. Here are the rules around it: which files say what, when a BOS
is written, which ids end an answer, what bytes an id stands for. How GGUF metadata becomes a tokenizer is in
gguf_vocabulary.py; ids that arrive one by one are for stream.py.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Core

from freehold.errors import BadFile, BadRequest, NotFound, UnsupportedModel
from freehold.text.gguf_vocabulary import read_gguf_vocabulary

# What ends an answer or a message in the families, where no generation_config.json says it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: one printable character for each byte; those that print stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer. Ids are those of the model's own tokenizer in transformers."""

    def __init__(
        self,
        core: Core,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: frozenset[int],
        adds_bos: bool,
    ):
        self._core = core
        self._added: dict[int, AddedToken] = core.get_added_tokens_decoder()
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = stop_ids
        self.adds_bos = adds_bos
        self.vocab_size = vocab_size  # one more than the largest id

    @classmethod
    def from_files(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer of a Hugging Face folder.

        Raises: NotFound without tokenizer.json, BadFile for a damaged one, UnsupportedModel for another kind.
        """
        core = _read_core(folder / "tokenizer.json")
        config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        generation = _read_json(folder / "generation_config.json")
        written_ids = core.encode("").ids  # what the post-processor puts around a text
        bos_id = _id_of(core, config, "bos_token")
        if written_ids and bos_id is None:
            bos_id = written_ids[0]
        if written_ids not in ([], [bos_id]):
            raise UnsupportedModel(
                f"tokenizer.json writes the ids {written_ids[:8]} around a text; only a BOS is known"
            )
        adds_bos = config.get("add_bos_token")
        eos_id = _id_of(core, config, "eos_token")
        return cls(
            core,
            vocab_size=1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=_stop_ids(core, eos_id, generation.get("eos_token_id")),
            adds_bos=bos_id is not None and (adds_bos if isinstance(adds_bos, bool) else bool(written_ids)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Return the tokenizer that a GGUF file holds in its metadata, given as plain Python values.

        Raises: BadFile for values of the wrong type, length or range, UnsupportedModel for an unknown `pre`.
        """
        vocabulary = read_gguf_vocabulary(metadata)
        core = vocabulary.make_core()
        return cls(
            core,
            vocab_size=len(vocabulary.tokens),
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            stop_ids=_turn_ends(core) | set(vocabulary.end_ids),
            adds_bos=vocabulary.adds_bos,
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt: special tokens written in it are recognised, and BOS comes first where it must.

        A text that begins with the BOS, as the templates of Llama write it, gets no second one.
        """
        ids = _encode(self._core, text)
        if self.adds_bos and self.bos_id is not None and not text.startswith(self.token_text(self.bos_id)):
            return [self.bos_id, *ids]
        return ids

    def encode_rendered(self, prompt: str) -> list[int]:
        """Return the ids of what a chat template wrote: special tokens are recognised, and nothing is added.

        The template alone decides on a BOS, as in transformers' apply_chat_template.
        """
        return _encode(self._core, prompt)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a user's words: nothing in them is a special token, and nothing is added."""
        return _encode(self._plain_core, text)

    def normalized(self, text: str) -> str:
        """Return the text that is split into tokens: Qwen's tokenizer composes characters first."""
        normalizer = self._core.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id stands for; none for an id past the vocabulary, where weights are only padding."""
        if added := self._added.get(token_id):
            return added.content.encode()
        token: str | None = self._core.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(map(BYTE_OF.__getitem__, token))
        except KeyError:
            return token.encode()  # not of the byte alphabet: stands for itself

    def token_text(self, token_id: int) -> str:
        """Return the text of one id; part of a character is shown as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of added tokens, which are no pieces of text."""
        return frozenset(self._added)

    def token_id(self, text: str) -> int | None:
        """Return the id of an added token, such as <|im_end|>, by its text."""
        return next((token_id for token_id, token in self._added.items() if token.content == text), None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides ids: the tokenizer as serialised, BOS, EOS and stop ids."""
        rules = [self.bos_id, self.eos_id, sorted(self.stop_ids), self.adds_bos]
        return hashlib.sha256(f"{self._core.to_str()}\n{json.dumps(rules)}".encode()).hexdigest()

    def to_files(self, folder: Path, *, chat_template: str | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers loads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos,
            "bos_token": None if self.bos_id is None else self.token_text(self.bos_id),
            "eos_token": None if self.eos_id is None else self.token_text(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        self._core.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, "utf-8")

    @cached_property
    def _plain_core(self) -> Core:
        """The same splitting and merging without one added token, so that none can be recognised."""
        plain = Core(self._core.model)
        plain.normalizer = self._core.normalizer
        plain.pre_tokenizer = self._core.pre_tokenizer
        return plain


def _encode(core: Core, text: str) -> list[int]:
    try:
        ids: list[int] = core.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError):
        raise BadRequest("text holds half a surrogate pair where Unicode text is wanted") from None
    return ids


def _read_core(path: Path) -> Core:
    if not path.is_file():
        raise NotFound("no tokenizer.json beside the model", hint="take it from the model's own repository")
    try:
        core = Core.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise BadFile(f"tokenizer.json cannot be read: {' '.join(str(error).split())[:200]}") from None
    # str() of the library's objects is their structure: a decoder may be one of a sequence.
    is_byte_level = isinstance(core.decoder, decoders.ByteLevel) or "ByteLevel(" in str(core.decoder)
    if not isinstance(core.model, models.BPE) or not is_byte_level:
        seen = f"{type(core.model).__name__} with decoder {type(core.decoder).__name__}"
        raise UnsupportedModel(f"tokenizer.json holds {seen}; byte-level BPE is what the supported families use")
    core.no_truncation()
    core.no_padding()
    return core


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise BadFile(f"{path.name} is not JSON") from None
    if not isinstance(content, dict):
        raise BadFile(f"{path.name} holds a {type(content).__name__} where an object is wanted")
    return content


def _id_of(core: Core, config: Mapping[str, Any], name: str) -> int | None:
    """Return the id of a token that a config names, as a text or as an object with its content."""
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    token_id: int | None = core.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise BadFile(f"tokenizer_config.json: {name} is {str(text)[:60]!r}, which is not in tokenizer.json")
    return token_id


def _stop_ids(core: Core, eos_id: int | None, configured: Any) -> frozenset[int]:
    """Return the ids that end an answer: EOS, and those of generation_config.json or else the families' turn ends."""
    eos = set() if eos_id is None else {eos_id}
    if configured is None:
        return _turn_ends(core) | eos
    ids = configured if isinstance(configured, list) else [configured]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise BadFile(f"generation_config.json: eos_token_id is {str(ids)[:60]} where one or more ids are wanted")
    return frozenset(eos | set(ids))


def _turn_ends(core: Core) -> frozenset[int]:
    added = core.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.content in TURN_ENDS)
