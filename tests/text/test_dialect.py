"""The dialect of a model follows its family, and its template where that says more."""

import pytest

from freehold.text.dialect import LLAMA, NEMOTRON, QWEN, dialect_for
from text.witnesses import template_of


@pytest.mark.parametrize(("family", "dialect"), [("nemotron", NEMOTRON), ("qwen", QWEN), ("llama", LLAMA)])
def test_without_a_template_the_family_decides(family, dialect):
    assert dialect_for(family, None) == dialect


def test_templates_of_the_families_keep_their_formats():
    assert dialect_for("nemotron", template_of("nemotron").source) == NEMOTRON
    assert dialect_for("llama", template_of("llama").source) == LLAMA
    qwen = dialect_for("qwen", template_of("qwen").source)
    assert (qwen.call_format, qwen.reasons) == ("json", False)  # Qwen 2.5 does not reason


def test_a_template_of_another_format_wins():
    assert dialect_for("llama", "{{ tools }} <tool_call> <think>") == QWEN
    assert dialect_for("qwen", "{{ tools }} <tool_call><function=f> <think>") == NEMOTRON


def test_smollm_has_no_format_for_calls():
    template = template_of("smollm")
    assert not template.accepts_tools
    assert not dialect_for("llama", template.source).reasons


def test_the_prompt_tells_whether_the_reasoning_is_open():
    assert NEMOTRON.is_reasoning_after("<|im_start|>assistant\n<think>\n")
    assert not NEMOTRON.is_reasoning_after("<|im_start|>assistant\n<think></think>")
    assert not LLAMA.is_reasoning_after("<think>")
