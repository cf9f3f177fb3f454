"""The Python API: a model by path or name, its text in and out, what an answer cost, and which model it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import freehold
from checkpoint.gguf_models import write_gguf_model
from engine.scripted import ScriptedDecoder
from freehold.checkpoint.fetch import fetch
from freehold.checkpoint.save import save_checkpoint
from freehold.engine.machine import Memory
from freehold.engine.model import Model, Usage
from freehold.engine.request import SamplingParams
from freehold.errors import BadInput, BadRequest, NotFound, UnsupportedModel
from freehold.models.families import family_of_config
from freehold.text.answer import ToolCallPiece, join_pieces
from freehold.text.tokenizer import BYTE_OF
from inputs import smollm2_gguf
from models.tiny import LLAMA, NEMOTRON, QWEN, Config, tiny_decoder
from models.witness import our_logits

# Ids 0 to 255 are bytes, then two special ones; the model's vocabulary is padded to 272.
END, START = 256, 257
VOCABULARY = BYTE_OF | {"<|im_end|>": END, "<|im_start|>": START}
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WIDE = {"vocab_size": 272, "max_position_embeddings": 1024}


def model_folder(folder: Path, config: Config = QWEN | WIDE, *, template: str | None = TEMPLATE) -> Path:
    """Write a tiny model with a tokenizer of bytes, and perhaps a template."""
    core = Tokenizer(BPE(vocab=VOCABULARY, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_end|>", "<|im_start|>"])

    def write_text_files(partial: Path) -> None:
        core.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        if template:
            (partial / "chat_template.jinja").write_text(template)

    decoder = tiny_decoder(config)
    save_checkpoint(folder, decoder, family=family_of_config(config), config=config, write_text_files=write_text_files)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder) -> Model:
    return freehold.load(folder)


def scripted(model: Model, script: str | bytes | Sequence[int]) -> Model:
    """Return the model with a decoder that writes this text and then ends its turn."""
    ids = [*(script.encode() if isinstance(script, str) else script), END]
    model.decoder = ScriptedDecoder(ids, spec=model.decoder.spec)
    return model


# As the documentation shows it.


def test_the_api_is_what_the_documentation_shows(folder, monkeypatch):
    monkeypatch.setenv("FREEHOLD_MODELS", str(folder.parent / "fetched"))
    fetch(str(folder), models_dir=folder.parent / "fetched", progress=lambda done, total: None)
    model = freehold.load("tiny", device="cpu", dtype=None)
    logits_TV = model.logits([1, 2, 3])
    assert (logits_TV.dtype, tuple(logits_TV.shape)) == (torch.float32, (3, 272))
    pieces = list(model.stream("Once upon a time", max_tokens=64, temperature=0.0, seed=0))
    assert all(isinstance(piece, str) and piece for piece in pieces)
    answer = model.chat([{"role": "user", "content": "Hello"}], max_tokens=64)
    assert (type(answer.text), answer.reasoning, answer.tool_calls) == (str, "", ())
    assert answer.usage.completion_tokens <= 64
    for part in ("decoder", "tokenizer", "text", "identity", "report"):
        assert getattr(model, part) is not None


def test_smollm2_answers():
    model = freehold.load(smollm2_gguf())
    answer = model.chat([{"role": "user", "content": "What is the capital of France? Answer briefly."}], max_tokens=16)
    assert answer.text == "The capital of France is Paris."
    assert (answer.usage.finish_reason, answer.usage.completion_tokens) == ("stop", 8)


@pytest.mark.parametrize("config", [LLAMA | WIDE, QWEN | WIDE, NEMOTRON | WIDE], ids=["llama", "qwen", "nemotron"])
def test_logits_are_those_of_the_decoder_that_was_saved(config, tmp_path):
    model = freehold.load(model_folder(tmp_path / "m", config))
    torch.testing.assert_close(model.logits([1, 2, 3]), our_logits(tiny_decoder(config), torch.tensor([1, 2, 3])))


def test_logits_may_fill_the_context_and_no_more(model):
    assert model.logits([1] * 1024).shape == (1024, 272)
    with pytest.raises(BadRequest, match="the prompt has 1025 tokens, the model's context is 1024"):
        model.logits([1] * 1025)
    with pytest.raises(BadRequest, match="the prompt is empty"):
        model.logits([])


# Finding and loading.


def test_a_model_is_found_by_folder_file_text_or_path(folder):
    for name in (folder, str(folder), folder / "model.safetensors", str(folder / "model.safetensors")):
        assert freehold.load(name).tokenizer.vocab_size == 258


def test_a_gguf_file_without_a_tokenizer_computes_and_says_what_it_lacks(tmp_path):
    model = freehold.load(write_gguf_model(tmp_path / "m.gguf", tiny_decoder(LLAMA), LLAMA))
    assert model.logits([1]).shape == (1, 97)
    with pytest.raises(BadInput, match="this checkpoint has no tokenizer"):
        next(model.stream("Hello"))
    with pytest.raises(BadRequest, match="this model has no chat template"):
        model.chat(HELLO)
    assert (model.identity.tokenizer, model.identity.template) == (None, None)


def test_a_model_without_a_template_continues_text_and_does_not_chat(tmp_path):
    model = freehold.load(model_folder(tmp_path / "m", template=None))
    assert list(model.stream("Hello", max_tokens=3))
    with pytest.raises(BadRequest, match="this model has no chat template") as caught:
        model.chat(HELLO)
    assert "freehold run" in str(caught.value.hint)


BAD_LOADS = {
    "unknown-name": ({"model": "tinny"}, NotFound, "no file, folder or model 'tinny'"),
    "catalogue-name": ({"model": "smollm2-135m-instruct"}, NotFound, "is not on this machine yet"),
    "empty-name": ({"model": ""}, NotFound, "no file, folder or model ''"),
    "unknown-dtype": ({"dtype": "int8"}, BadRequest, "dtype 'int8' is not known"),
    "torch-dtype": ({"dtype": torch.bfloat16}, BadRequest, "is not known"),
    "unknown-device": ({"device": "gpu"}, BadRequest, "device 'gpu' is not known"),
    "unsupported-device": ({"device": "meta"}, UnsupportedModel, "device 'meta' is not supported"),
    "absent-device": ({"device": "cuda:99"}, BadRequest, "device 'cuda:99' is not in this machine"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_load_that_cannot_be_is_one_clear_line(arguments, kind, message, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FREEHOLD_MODELS", str(tmp_path))
    with pytest.raises(kind, match=message) as caught:
        freehold.load(**{"model": folder} | arguments)
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_that_is_asked_for(name, folder):
    model = freehold.load(folder, dtype=name)
    assert model.decoder.dtype is getattr(torch, name)
    assert model.identity.dtype == name
    assert model.logits([1, 2]).dtype is torch.float32


# Text.


def test_pieces_hold_whole_characters_and_join_to_the_text(model):
    text = "naïve 🙂 日本 é"
    pieces = list(scripted(model, text).stream("x"))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert len(pieces) == len(text)


def test_half_a_character_at_the_end_is_shown_once(model):
    assert "".join(scripted(model, "🙂".encode()[:3]).stream("x")) == "�"
    assert "".join(scripted(model, "a🙂").stream("x", max_tokens=3)) == "a�"


def test_the_id_that_ends_the_answer_is_no_part_of_it(model):
    usage = Usage()
    assert "".join(scripted(model, "done").stream("x", usage=usage)) == "done"
    assert (usage.prompt_tokens, usage.completion_tokens, usage.finish_reason) == (1, 5, "stop")


def test_a_request_may_name_further_ids_that_end_it(model):
    usage, sampling = Usage(), SamplingParams(stop_ids=frozenset({ord("n")}))
    assert "".join(scripted(model, "done").stream("x", sampling=sampling, usage=usage)) == "do"
    assert (usage.completion_tokens, usage.finish_reason) == (3, "stop")


def test_with_ignore_eos_the_models_own_end_is_an_id_like_any_other(model):
    usage, sampling = Usage(), SamplingParams(ignore_eos=True, max_tokens=7)
    assert "".join(scripted(model, "done").stream("x", sampling=sampling, usage=usage)).startswith("done")
    assert (usage.completion_tokens, usage.finish_reason) == (7, "length")


def test_a_stop_string_within_min_tokens_is_text(model):
    sampling = SamplingParams(stop=("END",), min_tokens=3)
    assert "".join(scripted(model, "END, the END").stream("x", sampling=sampling)) == "END, the "


@pytest.mark.parametrize("stop", [("END",), ("xyz", "END", "ENDE")], ids=str)
def test_a_stop_string_across_tokens_ends_the_answer_and_is_no_part_of_it(stop, model):
    usage = Usage()
    pieces = scripted(model, "say EN and EEND and more").stream("x", sampling=SamplingParams(stop=stop), usage=usage)
    assert "".join(pieces) == "say EN and E"
    assert (usage.completion_tokens, usage.finish_reason) == (len("say EN and EEND"), "stop")


def test_what_only_began_a_stop_string_is_shown_at_the_end(model):
    sampling = SamplingParams(stop=("END",))
    assert "".join(scripted(model, "say EN").stream("x", sampling=sampling)) == "say EN"
    assert "".join(scripted(model, "say END").stream("x", sampling=sampling, max_tokens=6)) == "say EN"


def test_an_answer_that_is_cut_says_so(model):
    usage = Usage()
    assert "".join(scripted(model, "a long answer").stream("x", max_tokens=4, usage=usage)) == "a lo"
    assert (usage.completion_tokens, usage.finish_reason) == (4, "length")
    assert usage.prefill_s > 0
    assert usage.decode_tokens_per_s > 0


def test_an_answer_that_ends_by_itself_with_its_last_token_is_not_cut(model):
    usage = Usage()
    assert "".join(scripted(model, "abc").stream("x", max_tokens=4, usage=usage)) == "abc"
    assert usage.finish_reason == "stop"


def test_an_answer_that_is_left_in_the_middle_has_no_finish_reason(model):
    usage = Usage()
    pieces = scripted(model, "abcdef").stream("x", usage=usage)
    next(pieces)
    pieces.close()
    assert (usage.completion_tokens, usage.finish_reason) == (1, "")


def test_what_is_given_by_name_replaces_what_the_sampling_says(model):
    sampling = SamplingParams(max_tokens=50, temperature=1.0, seed=1)
    by_name = "".join(model.stream("x", sampling=sampling, max_tokens=8, seed=2))
    assert by_name == "".join(model.stream("x", max_tokens=8, temperature=1.0, seed=2))
    greedy = "".join(model.stream("x", sampling=sampling, max_tokens=8, temperature=0.0))
    assert greedy == "".join(model.stream("x", max_tokens=8))
    assert by_name != greedy


@pytest.mark.parametrize("named", [{"max_tokens": 0}, {"temperature": float("nan")}, {"seed": "1"}], ids=str)
def test_a_value_that_cannot_be_is_refused_before_anything_runs(named, model):
    with pytest.raises(BadRequest, match=f"{next(iter(named))} is"):
        model.stream("x", **named)
    with pytest.raises(BadRequest, match=f"{next(iter(named))} is"):
        model.chat(HELLO, **named)


def test_the_same_seed_writes_the_same_text_and_another_another(model):
    texts = ["".join(model.stream("x", max_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_padding_of_the_vocabulary_is_never_written(model):
    usage = Usage()
    list(model.stream("x", max_tokens=200, temperature=5.0, seed=0, usage=usage))
    model.decoder = ScriptedDecoder([65], spec=model.decoder.spec, say=lambda logits_V: logits_V[258:].fill_(99.0))
    assert "".join(model.stream("x", max_tokens=3)) == "AAA"


@pytest.mark.parametrize(("prompt", "message"), [("", "the prompt is empty"), ("x" * 1024, "1024 tokens")])
def test_a_prompt_that_cannot_be_read_is_refused(prompt, message, model):
    with pytest.raises(BadRequest, match=message):
        next(model.stream(prompt))


# Chat.


def test_a_chat_is_rendered_by_the_template_and_read_as_special_ids(model):
    prompt = model.render(HELLO)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer.encode(prompt)
    assert (ids[0], ids.count(START), ids.count(END)) == (START, 2, 1)
    assert scripted(model, "Hi.").chat(HELLO).usage.prompt_tokens == len(ids)


THOUGHT = "<think>\nIt is a greeting.\n</think>\n\nHi 🙂"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


def test_reasoning_is_kept_apart_from_the_text(model):
    answer = scripted(model, THOUGHT).chat(HELLO)
    assert (answer.reasoning, answer.text, answer.tool_calls) == ("It is a greeting.", "Hi 🙂", ())
    assert answer.usage.finish_reason == "stop"


def test_reasoning_that_the_template_has_opened_is_reasoning(model):
    answer = scripted(model, "Hm.\n</think>\n\nHi").chat(HELLO, switches={"enable_thinking": True})
    assert (answer.reasoning, answer.text) == ("Hm.", "Hi")


def test_tool_calls_are_read_where_tools_are_given(model):
    answer = scripted(model, "Let me see.\n" + CALL).chat(HELLO, tools=[WEATHER])
    (call,) = answer.tool_calls
    assert (answer.text, call.name, json.loads(call.arguments)) == ("Let me see.", "weather", {"city": "Bonn"})
    assert scripted(model, CALL).chat(HELLO).text == CALL


def test_a_streamed_chat_joins_to_the_whole_one(model):
    script = THOUGHT + "\n" + CALL
    usage = Usage()
    pieces = list(scripted(model, script).chat_stream(HELLO, tools=[WEATHER], usage=usage))
    joined, whole = join_pieces(pieces), scripted(model, script).chat(HELLO, tools=[WEATHER])
    assert (joined.text, joined.reasoning, joined.tool_calls) == (whole.text, whole.reasoning, whole.tool_calls)
    assert isinstance(pieces[-1], ToolCallPiece)
    timeless = {"prefill_s": 0, "decode_s": 0}
    assert asdict(usage) | timeless == asdict(whole.usage) | timeless


def test_a_chat_of_wrong_form_is_refused_before_it_is_read(model):
    for messages in ([], [{"role": "user"}], [{"content": "x"}], "hello"):
        with pytest.raises(BadRequest):
            model.chat_stream(messages)
    with pytest.raises(BadRequest, match="max_tokens is"):
        model.chat_stream(HELLO, max_tokens=0)


# Which model it was.


def test_the_identity_is_made_of_digests_that_anyone_can_check(folder):
    identity = freehold.load(folder).identity
    assert identity.weights == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert identity.template == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert identity.tokenizer is not None
    assert all(len(digest) == 64 for digest in (identity.config, identity.tokenizer))
    assert identity.kernels.startswith(freehold.__version__)


def test_the_identity_changes_with_each_part_and_with_nothing_else(tmp_path):
    def identity_with(name: str, change: Any) -> dict[str, Any]:
        folder = model_folder(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        return asdict(freehold.load(folder).identity)

    def last_bit(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    before = identity_with("config.json", bytes)
    changes = {
        "weights": ("model.safetensors", last_bit),
        "config": ("config.json", lambda data: data.replace(b"1000000.0", b"1000001.0")),
        "tokenizer": ("tokenizer.json", lambda data: data.replace(b"<|im_start|>", b"<|im_other|>")),
        "template": ("chat_template.jinja", lambda data: data + b" "),
    }
    for part, (name, change) in changes.items():
        after = identity_with(name, change)
        assert {key for key in before if before[key] != after[key]} == {part}
    assert identity_with("config.json", lambda data: data + b"\n") == before


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(
        "freehold.engine.model.memory_of", lambda device: Memory(total_bytes=2**30, available_bytes=10**7)
    )
    with pytest.raises(BadInput, match=r"need 537,919,488 bytes of memory, 10,000,000 are free on cpu"):
        freehold.load(smollm2_gguf(), dtype="float32")
