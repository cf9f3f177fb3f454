"""Real tokenizers and templates, ours beside those of transformers, and what both make of a conversation."""

import copy
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Core
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from freehold.checkpoint.source import open_source
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from inputs import llama3_tokenizer_dir, qwen_coder_gguf, qwen_tokenizer_dir, smollm2_gguf
from text.conversations import CALLED, CLOCK, PARALLEL, PLAIN, REASONED, WEATHER

GOLDEN = Path(__file__).parent.parent / "golden"
RENDERINGS = GOLDEN / "renderings.json"
FIRST_QWEN3_ID = 151665
FAMILIES = ("smollm", "qwen", "llama", "nemotron")


class Case(NamedTuple):
    """One conversation as one family renders it."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    switches: dict[str, Any]
    add_generation_prompt: bool


@cache
def gguf_metadata(path: Path) -> dict[str, Any]:
    with open_source(path) as source:
        return dict(source.metadata)


@cache
def tokenizer_of(family: str) -> Tokenizer | None:
    """Return our tokenizer of a family. None can be had for Nemotron."""
    if family == "smollm":
        return Tokenizer.from_gguf(gguf_metadata(smollm2_gguf()))
    if family == "qwen":
        return Tokenizer.from_gguf(gguf_metadata(qwen_coder_gguf()))
    return Tokenizer.from_files(llama3_tokenizer_dir()) if family == "llama" else None


@cache
def witness_of(family: str) -> Any:
    """Return transformers' tokenizer of a family.

    For SmolLM2 it comes from the GGUF file, where transformers 5.23 leaves out that each digit stands alone, as the
    model's own tokenizer and llama.cpp have it: of the two spaces in "x =  12" it would keep one with the number. That
    step is put in here. For Qwen it comes from the model's own files, since from GGUF transformers leaves out the NFC
    normalisation; the files are Qwen 3's, so the four tokens that Qwen 2.5 lacks are taken out.
    """
    if family == "smollm":
        path = smollm2_gguf()
        witness = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        witness.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        return witness
    if family == "llama":
        return AutoTokenizer.from_pretrained(llama3_tokenizer_dir())
    content = json.loads((qwen_tokenizer_dir() / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < FIRST_QWEN3_ID]
    return PreTrainedTokenizerFast(tokenizer_object=Core.from_str(json.dumps(content)))


def template_of(family: str) -> ChatTemplate:
    if family == "nemotron":
        return ChatTemplate((GOLDEN / "nemotron_chat_template.jinja").read_text("utf-8"))
    if family == "llama":
        source = (GOLDEN / "llama31_chat_template.jinja").read_text("utf-8")
        return ChatTemplate(source, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    path = smollm2_gguf() if family == "smollm" else qwen_coder_gguf()
    return ChatTemplate(gguf_metadata(path)["tokenizer.chat_template"])


def rendered_by_witness(template: ChatTemplate, case: Case) -> str:
    """Return what transformers' apply_chat_template makes of a case."""
    texts, _ = render_jinja_template(
        [copy.deepcopy(case.messages)],
        tools=copy.deepcopy(case.tools),
        chat_template=template.source,
        add_generation_prompt=case.add_generation_prompt,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        **case.switches,
    )
    return texts[0]


def rendered(template: ChatTemplate, case: Case) -> str:
    return template.render(
        case.messages,
        tools=case.tools,
        add_generation_prompt=case.add_generation_prompt,
        switches=case.switches,
    )


def cases_of(family: str) -> Iterator[Case]:
    conversations = {**PLAIN, **({} if family == "smollm" else CALLED)}
    if family in ("qwen", "nemotron"):
        conversations |= PARALLEL
    switches: list[dict[str, Any]] = [{}]
    if family == "nemotron":
        conversations |= REASONED
        switches += [{"enable_thinking": False}, {"truncate_history_thinking": False}]
    if family == "llama":
        switches += [{"tools_in_user_message": False, "date_string": "1 Jan 2027"}]
    for name, messages in conversations.items():
        for tools in [None] if family == "smollm" else [None, [WEATHER, CLOCK]]:
            for chosen in switches:
                for prompted in (True, False):
                    shown = ", ".join([name, *["tools"] * bool(tools), *chosen, *["unprompted"] * (not prompted)])
                    yield Case(shown, messages, tools, chosen, prompted)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def golden_of(family: str, case: Case, text: str, ids: list[int] | None) -> dict[str, Any]:
    """Return what is stored: digests of text and ids, and the text itself where the template is our own."""
    shown = family in ("llama", "nemotron") and case.add_generation_prompt
    stored = {"text": text} if shown else {"text_sha256": digest(text)}
    return stored if ids is None else {**stored, "num_ids": len(ids), "ids_sha256": digest(ids)}


def main() -> None:
    """Write the golden file anew, from transformers alone: PYTHONPATH=src:tests python -m text.witnesses"""
    golden: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        template = template_of(family)
        for case in cases_of(family):
            text = rendered_by_witness(template, case)
            ids = None if family == "nemotron" else witness_of(family)(text, add_special_tokens=False).input_ids
            golden.setdefault(family, {})[case.name] = golden_of(family, case, text, ids)
    RENDERINGS.write_text(json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
