"""Tokenizer, template and dialect of a checkpoint: found, copied, rebuilt from GGUF, and read by transformers."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models

from checkpoint.gguf_models import write_gguf_model
from freehold.checkpoint.load import open_described
from freehold.checkpoint.save import save_checkpoint
from freehold.checkpoint.text_side import TextSide, load_text_side
from freehold.errors import BadFile
from freehold.models.families import family_of_config
from inputs import smollm2_gguf
from models.tiny import LLAMA, tiny_decoder

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "a"}]


def folder_with(tmp_path: Path, **files: str) -> Path:
    """Return the folder of a tiny model with these files beside it; `__` in a name stands for a dot."""
    folder = tmp_path / "m"
    save_checkpoint(folder, tiny_decoder(LLAMA), family=family_of_config(LLAMA), config=LLAMA)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def tokenizer_json() -> str:
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return core.to_str()


def text_side_of(path: Path) -> TextSide:
    source, described = open_described(path)
    with source:
        return load_text_side(source, described)


CONFIG = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})


def test_a_folder_without_text_files_has_no_text_side(tmp_path):
    found = text_side_of(folder_with(tmp_path))
    assert (found.tokenizer, found.template, found.files, found.dialect.name) == (None, None, (), "llama")


def test_a_gguf_file_without_a_vocabulary_has_no_text_side(tmp_path):
    found = text_side_of(write_gguf_model(tmp_path / "m.gguf", tiny_decoder(LLAMA), LLAMA))
    assert (found.tokenizer, found.template, found.files) == (None, None, ())


TEMPLATES = {
    "own file": {"chat_template__jinja": TEMPLATE},
    "own file before the config": {
        "chat_template__jinja": TEMPLATE,
        "tokenizer_config__json": json.dumps(json.loads(CONFIG) | {"chat_template": "other"}),
    },
    "json file": {"chat_template__json": json.dumps({"chat_template": TEMPLATE})},
    "config": {"tokenizer_config__json": json.dumps(json.loads(CONFIG) | {"chat_template": TEMPLATE})},
    "named default": {
        "tokenizer_config__json": json.dumps(
            json.loads(CONFIG)
            | {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]}
        )
    },
}


@pytest.mark.parametrize("files", TEMPLATES.values(), ids=TEMPLATES)
def test_the_template_is_found_wherever_it_is_and_knows_the_tokens(files, tmp_path):
    tokenizer = {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": CONFIG}
    found = text_side_of(folder_with(tmp_path, **tokenizer | files))
    assert found.template is not None
    assert found.template.source == TEMPLATE
    assert found.template.render(MESSAGES) == "<s>a</s>"


NO_TEMPLATES = {
    "not UTF-8": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not UTF-8"),
    "a number": ("tokenizer_config.json", b'{"chat_template": 7}', "the chat template is no text"),
    "an object": ("chat_template.json", b'{"chat_template": {"a": "b"}}', "the chat template is no text"),
    "a default that is a list": (
        "chat_template.json",
        b'{"chat_template": [{"name": "default", "template": ["x"]}]}',
        "the chat template is no text",
    ),
    "broken JSON": ("tokenizer_config.json", b"{", "tokenizer_config.json: its JSON cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), NO_TEMPLATES.values(), ids=NO_TEMPLATES)
def test_a_template_that_is_none_is_refused(name, content, message, tmp_path):
    folder = folder_with(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(BadFile, match=message):
        text_side_of(folder)


@pytest.mark.parametrize("entries", [[], [{"name": ["x"]}], ["x"], [{"name": "rag", "template": "x"}]], ids=str)
def test_a_list_without_a_default_is_no_template(entries, tmp_path):
    folder = folder_with(tmp_path, chat_template__json=json.dumps({"chat_template": entries}))
    assert text_side_of(folder).template is None


def test_a_gguf_template_that_is_no_text_is_refused(tmp_path):
    def change(metadata):
        metadata["tokenizer.chat_template"] = 7

    path = write_gguf_model(tmp_path / "m.gguf", tiny_decoder(LLAMA), LLAMA, change=change)
    with pytest.raises(BadFile, match="the chat template is no text"):
        text_side_of(path)


def test_files_are_copied_as_they_are_and_code_is_not_among_them(tmp_path):
    odd_but_valid = CONFIG.replace(",", "  ,\r\n")
    files = {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": odd_but_valid, "vocab__json": "{}"}
    files |= {"chat_template__jinja": TEMPLATE + "\r\n", "tokenization_tiny__py": "raise SystemExit", "README__md": "x"}
    folder = folder_with(tmp_path, **files)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode() + b"\r\n")
    target = tmp_path / "copy"
    target.mkdir()
    text_side_of(folder).write_files(target)
    copied = sorted(path.name for path in target.iterdir())
    assert copied == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    for name in copied:
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_without_a_text_side_writes_no_files(tmp_path):
    source_folder, target = folder_with(tmp_path), tmp_path / "copy"
    target.mkdir()
    text_side_of(source_folder).write_files(target)
    assert list(target.iterdir()) == []


# SmolLM2, from GGUF to files.

STRINGS = [
    "Hello, world!",
    " The  year 2024,\n\n\tnaïve café: 12345 + x_1 = 'don't' <|im_start|>user\nhi<|im_end|>",
    "日本語 and 🙂👩‍👩‍👧 emoji",
    "",
    "def f(x):\n    return x**2  # squares\r\n",
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And  now?\n"},
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[TextSide, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    found = text_side_of(smollm2_gguf())
    found.write_files(folder)
    return found, folder


def test_transformers_gets_the_same_ids_from_the_files_we_write(smollm2):
    found, folder = smollm2
    witness = transformers.AutoTokenizer.from_pretrained(folder)
    assert found.tokenizer is not None
    for text in STRINGS:
        ids = found.tokenizer.encode(text)
        assert witness(text)["input_ids"] == ids
        assert witness.decode(ids) == text
    assert (witness.bos_token_id, witness.eos_token_id) == (found.tokenizer.bos_id, found.tokenizer.eos_id)


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]], ids=["system", "no-system"])
def test_transformers_renders_the_same_conversation_from_the_files_we_write(messages, smollm2):
    found, folder = smollm2
    witness = transformers.AutoTokenizer.from_pretrained(folder)
    assert found.template is not None
    expected = witness.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found.template.render(messages) == expected
    assert witness.chat_template == found.template.source


def test_the_files_we_write_give_the_same_text_side_again(smollm2, tmp_path):
    found, written = smollm2
    folder = folder_with(tmp_path, **{p.name.replace(".", "__"): p.read_text() for p in written.iterdir()})
    again = text_side_of(folder)
    assert found.tokenizer is not None
    assert again.tokenizer is not None
    assert again.template is not None
    assert found.template is not None
    assert again.template.digest == found.template.digest
    assert again.tokenizer.digest == found.tokenizer.digest
    assert again.dialect == found.dialect
    for text in STRINGS:
        assert again.tokenizer.encode(text) == found.tokenizer.encode(text)
    for field in ("bos_id", "eos_id", "stop_ids", "adds_bos", "vocab_size"):
        assert getattr(again.tokenizer, field) == getattr(found.tokenizer, field), field


def test_generation_stops_in_transformers_where_it_stops_here(smollm2):
    found, folder = smollm2
    witness = transformers.GenerationConfig.from_pretrained(folder)
    assert found.tokenizer is not None
    assert set(witness.eos_token_id) == found.tokenizer.stop_ids
