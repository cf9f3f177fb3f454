"""Rows of training data by number: texts, and conversations in which freehold-pico tells, answers and admits.

A row is what `freehold data build` reads: {"text": ...} or {"messages": ...}. The row of a number is the same in every
run. What is said here is all that a user will hear, so it is short, and true where it says something about the world.
"""

import random
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import answers
from answers import Turn
from grammar import VARIABLE, WORDS, Story, filled, tell

Row = dict[str, Any]


def text_row(number: int) -> Row:
    """Return a text: a story, sometimes under a title."""
    rng = random.Random(f"text {number}")
    told = tell(rng)
    title = filled("The $kind and the $fkind", rng, told.words).title() if rng.random() < 0.1 else ""
    return {"text": f"{title}\n\n{told.text}" if title else told.text}


def chat_row(number: int) -> Row:
    """Return a conversation of one kind, or of two, one after the other."""
    rng = random.Random(f"chat {number}")
    turns = _drawn(rng)
    if rng.random() < 0.2:
        turns += _drawn(rng)
    roles = [
        message
        for asked, answer in turns
        for message in ({"role": "user", "content": _as_typed(asked, rng)}, {"role": "assistant", "content": answer})
    ]
    return {"messages": roles}


def _drawn(rng: random.Random) -> list[Turn]:
    kinds, shares = zip(*SHARES.items(), strict=True)
    return list(rng.choices(kinds, weights=shares)[0](rng))


def _as_typed(text: str, rng: random.Random) -> str:
    """Return a question as people type: not always with a capital letter, or with a mark at its end."""
    text = text[0].upper() + text[1:] if rng.random() < 0.75 else text[0].lower() + text[1:]
    return text.rstrip(".?!") if rng.random() < 0.2 else text


def told_on_request(rng: random.Random) -> list[Turn]:
    """A story that is asked for; sometimes with a question about it, or one more story."""
    told = tell(rng)
    kind = rng.choices(["about_somebody", "about_theme", "about_anything"], weights=[7, 2, 2])[0]
    turns = [(_request(rng, kind, told), told.text)]
    if rng.random() < 0.15:
        turns.append(_question(rng, told))
    elif rng.random() < 0.15:
        more = tell(rng)
        turns.append((_request(rng, "another", more), more.text))
    return turns


def continued(rng: random.Random) -> list[Turn]:
    """A story whose beginning is given."""
    told = tell(rng)
    num_given = rng.choice([1, 1, 2, 3])
    given, rest = " ".join(told.sentences[:num_given]), " ".join(told.sentences[num_given:])
    return [(rng.choice(requests()["rest"]) + given, rest)]


def read(rng: random.Random) -> list[Turn]:
    """A story that is given, and a question about it."""
    told = tell(rng)
    question, answer = _question(rng, told)
    return [(f"{told.text} {question}", answer)]


@cache
def requests() -> dict[str, list[str]]:
    """Return the forms of requests and questions, by kind."""
    return tomllib.loads((WORDS / "requests.toml").read_text(encoding="utf-8"))


def _request(rng: random.Random, kind: str, told: Story) -> str:
    return filled(rng.choice(_fitting(requests()[kind], told)), rng, told.words)


def _question(rng: random.Random, told: Story) -> Turn:
    """Return a question about a story that its text answers, and the answer."""
    form = rng.choice(_fitting([*requests()["questions"], *told.questions], told))
    question, _, answer = form.partition("? ")
    return filled(f"{question}?", rng, told.words), filled(answer, rng, told.words)


def _fitting(forms: Sequence[str], told: Story) -> list[str]:
    """Return the forms whose words are in a story's text."""
    named = {"name", "kind", "who", "friend", "fkind", "thing", "colour", "food", "place"}
    return [f for f in forms if all(told.words[word] in told.text for word in named & set(VARIABLE.findall(f)))]


# In percent of what conversations are put together from.
SHARES: dict[Callable[[random.Random], list[Turn]], int] = {
    **{told_on_request: 40, continued: 10, read: 6},
    **{answers.animal: 10, answers.thing: 10, answers.person: 2, answers.little_fact: 3, answers.small_sum: 2},
    **{answers.small_talk: 12, answers.too_hard: 5},
}
