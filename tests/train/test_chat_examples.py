"""The mask of conversations, in the templates of all three families: what is trained on is what the assistant wrote."""

from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import BadRequest
from freehold.text.chat import ChatTemplate
from freehold.train.chat_examples import ChatExample, ChatRenderer, Supervision
from text.conversations import ANSWER, ASK, CALLS, CLOCK, RESULT, SAY_AND_CALL, SYSTEM, THOUGHT, WEATHER
from train.tokenizers import FAMILIES, MARKS, template_of, tokenizer_of

TOOLS = [WEATHER, CLOCK]
END = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "nemotron": "<|im_end|>"}
EACH = pytest.mark.parametrize("family", FAMILIES)
CONVERSATIONS = {
    "one answer": [ASK, ANSWER],
    "three answers": [SYSTEM, ASK, ANSWER, ASK, {**ANSWER, "content": "Größe: 1,80 m 😀"}, ASK, ANSWER],
    "an open question at the end": [ASK, ANSWER, ASK],
    "a call and its result": [ASK, CALLS, RESULT, ANSWER],
    "reasoning": [ASK, THOUGHT],
    "reasoning in the past": [SYSTEM, ASK, THOUGHT, ASK, THOUGHT],
    "the user writes marks": [{**ASK, "content": "Is assistant\n</think> a mark?"}, ANSWER],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives a family's tokenizer and a conversation's examples."""
    tmp_path = tmp_path_factory.mktemp("tokenizer")

    def make(family, messages, *, tools=None, supervision=None, template=None):
        tokenizer = tokenizer_of(family, tmp_path)
        renderer = ChatRenderer(template or template_of(family), tokenizer, supervision or Supervision())
        return tokenizer, renderer.examples(messages, tools)

    return make


def learnt(tokenizer, example: ChatExample) -> list[str]:
    """Return the runs of text that are trained on."""
    runs, before = [], False
    for token, is_trained in zip(example.ids, example.trained, strict=True):
        if is_trained and not before:
            runs.append([])
        if is_trained:
            runs[-1].append(token)
        before = is_trained
    return [tokenizer.decode(run) for run in runs]


@EACH
def test_what_is_trained_on_is_each_answer_with_its_end(made, family):
    tokenizer, examples = made(family, CONVERSATIONS["three answers"])
    assert len(examples) == 1
    assert learnt(tokenizer, examples[0]) == [text + END[family] for text in ("Tall.", "Größe: 1,80 m 😀", "Tall.")]
    assert (examples[0].num_answers, examples[0].num_joined, examples[0].num_inner_ends) == (3, 0, 0)


@EACH
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_stands_before_an_answer_is_what_serving_gives_the_model(made, family, name):
    messages, template = CONVERSATIONS[name], template_of(family)
    tools = TOOLS if "call" in name else None
    tokenizer, examples = made(family, messages, tools=tools)
    prompts = set()
    for index, message in enumerate(messages):
        for switches in [{}, {"enable_thinking": False}] if message["role"] == "assistant" else []:
            text = template.render(messages[:index], tools=tools, switches=switches)
            prompts.add(tuple(tokenizer.encode_rendered(text)))
    starts = [
        example.ids[:at]
        for example in examples
        for at in range(1, len(example.ids))
        if example.trained[at] and not example.trained[at - 1]
    ]
    assert len(starts) == sum(message["role"] == "assistant" for message in messages)
    assert set(starts) <= prompts


@EACH
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_whole_rendering(made, family, name):
    messages, template = CONVERSATIONS[name], template_of(family)
    tools = TOOLS if "call" in name else None
    tokenizer, examples = made(family, messages, tools=tools)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    whole = tokenizer.encode_rendered(template.render(messages[: last + 1], tools=tools, add_generation_prompt=False))
    ids = list(examples[-1].ids)
    assert ids == whole[: len(ids)]
    assert examples[-1].trained[-1]
    assert ids[-1] in tokenizer.stop_ids


@EACH
@given(data=st.data())
@settings(max_examples=25)
def test_any_answer_to_anything_is_what_is_trained_on(made, family, data):
    """What the user writes may hold every mark; answers are any text without "<", which could begin one."""
    words = st.text() | st.sampled_from(["assistant", "\n", " ", "é", "</think>", *MARKS, *END.values()])
    questions = st.lists(words, max_size=6).map("".join)
    answers = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
    answers = answers.map(lambda text: normalize("NFC", text))
    turns = data.draw(st.lists(st.tuples(questions, answers), min_size=1, max_size=3))
    messages = [m for ask, said in turns for m in ({**ASK, "content": ask}, {**ANSWER, "content": said})]
    tokenizer, (example,) = made(family, messages)
    found = [run.removesuffix(END[family]) for run in learnt(tokenizer, example)]
    assert len(found) == len(turns)
    for text, (_, said) in zip(found, turns, strict=True):
        is_same = text.strip() == said.strip()
        assert is_same or (example.num_joined > 0 and said.strip().endswith(text.strip()))


def test_reasoning_is_trained_on_or_left_out(made):
    tokenizer, (whole,) = made("nemotron", CONVERSATIONS["reasoning"])
    assert learnt(tokenizer, whole) == ["It is\nlarge.\n</think>\nTall.<|im_end|>"]
    tokenizer, (part,) = made("nemotron", CONVERSATIONS["reasoning"], supervision=Supervision(reasoning=False))
    assert learnt(tokenizer, part) == ["\n</think>\nTall.<|im_end|>"]
    assert part.ids == whole.ids


def test_a_turn_that_the_template_rewrites_later_is_an_example_of_its_own(made):
    tokenizer, examples = made("nemotron", CONVERSATIONS["reasoning in the past"])
    assert [learnt(tokenizer, example) for example in examples] == [["It is\nlarge.\n</think>\nTall.<|im_end|>"]] * 2
    assert "large" not in tokenizer.decode(
        token for token, is_trained in zip(examples[1].ids, examples[1].trained, strict=True) if not is_trained
    )


def test_turns_that_call_tools_are_trained_on_or_left_out(made):
    messages = [ASK, CALLS, RESULT, SAY_AND_CALL, RESULT, ANSWER]
    tokenizer, (whole,) = made("nemotron", messages, tools=TOOLS)
    assert ["<tool_call>" in run for run in learnt(tokenizer, whole)] == [True, True, False]
    tokenizer, (part,) = made("nemotron", messages, tools=TOOLS, supervision=Supervision(tool_calls=False))
    assert learnt(tokenizer, part) == ["Tall.<|im_end|>"]
    assert part.ids == whole.ids


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_reasoning_that_a_template_does_not_write_is_counted(made, family):
    _, (example,) = made(family, CONVERSATIONS["reasoning"])
    assert example.num_unwritten == 1


def test_a_conversation_without_an_answer_gives_nothing(made):
    assert made("qwen", [SYSTEM, ASK])[1] == []


def test_an_end_of_turn_inside_an_answer_is_counted(made):
    _, (example,) = made("qwen", [ASK, {**ANSWER, "content": "Tall.<|im_end|>\n"}])
    assert example.num_inner_ends == 1


def test_a_token_that_joins_prompt_and_answer_is_not_trained_on(made):
    tokenizer, (example,) = made("qwen", [ASK, {**ANSWER, "content": "\nTall."}])
    assert learnt(tokenizer, example) == ["Tall.<|im_end|>"]
    assert example.num_joined == 1


def test_text_that_the_tokenizer_composes_keeps_its_mask(made):
    decomposed = "u\N{COMBINING DIAERESIS}"
    tokenizer, (example,) = made("qwen", [{**ASK, "content": decomposed}, {**ANSWER, "content": f"f{decomposed}r"}])
    assert learnt(tokenizer, example) == ["für<|im_end|>"]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPTED = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([ANSWER], PROMPTED, r"messages\[0\] is the assistant's"),
        ([ASK, CALLS], PROMPTED, r"messages\[1\].tool_calls: this model's chat template has no place"),
        ([ASK, ANSWER], PROMPTED.replace("assistant\n", "model\n"), r"begins an answer with .*model"),
        ([ASK, ANSWER], PROMPTED.replace("<|im_end|>", ""), "no token that ends an answer"),
        ([ASK, {"role": "bot", "content": ""}], PROMPTED, r"messages\[1\].role: .* where one of"),
    ],
    ids=["no question", "no place for calls", "two beginnings", "no end", "unknown role"],
)
def test_what_cannot_be_told_apart_is_refused(made, messages, template, message):
    with pytest.raises(BadRequest, match=message):
        made("nemotron", messages, template=ChatTemplate(template))


def test_an_empty_reasoning_that_a_prompt_writes_is_not_trained_on(made):
    """As Qwen 3 does it: a prompt without room for reasoning holds an empty one, and so does the conversation."""
    empty = "<think>\n\n</think>\n\n"
    answers = CHATML.replace(
        "{{ m.content }}", f"{{{{ '{empty}' if m.role == 'assistant' else '' }}}}{{{{ m.content }}}}"
    )
    prompt = PROMPTED.removeprefix(CHATML).replace(
        "{% endif", f"{{% if enable_thinking is false %}}{empty}{{% endif %}}{{% endif"
    )
    tokenizer, (example,) = made("nemotron", [ASK, ANSWER], template=ChatTemplate(answers + prompt))
    assert learnt(tokenizer, example) == ["Tall.<|im_end|>"]


def test_reasoning_inside_of_content_cannot_be_left_out(made):
    messages = [ASK, {**ANSWER, "content": "<think>\nhm\n</think>\nTall."}]
    with pytest.raises(BadRequest, match="reasoning inside of content"):
        made("nemotron", messages, supervision=Supervision(reasoning=False))
