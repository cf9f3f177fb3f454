"""Short tales, and questions about them: our own words, put together by a grammar (tales.toml) and a number.

One number gives one conversation, the same in every run: somebody asks for a story, hears it, and may ask about it. The
tales teach a small model what its size allows: to stay with the people, the things and the trouble that a story began
with.
"""

import random
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}
OPENINGS = (
    "Once upon a time there was {a_little} {kind} named {hero}.",
    "Once there was {a_little} {kind}. {His} name was {hero}.",
    "In the {place} there lived {a_little} {kind} named {hero}.",
    "{Hero} was {a_little} {kind} who lived in the {place}.",
    "There once was {a_kind} named {hero}. {He} was very {little}.",
    "Long ago, near the {place}, lived {a_little} {kind} named {hero}.",
)
REQUESTS = (
    "Tell me a story about {a_little} {kind} named {hero}.",
    "Tell me a story about {a_kind} and {a_fkind}.",
    "Tell me a story about {a_kind}.",
    "Tell me a story about {about}.",
    "Write a short story about {about}.",
    "Write a story about {hero} the {kind} and {friend} the {fkind}.",
    "Can you tell me a story about {about}?",
    "Please tell me a story with {a_kind} in it.",
    "I would like to hear a story about {a_little} {kind}.",
    "Tell me a story.",
    "Tell me a bedtime story, please.",
    "Write a story that happens in the {place}.",
)


def tale(index: int) -> list[dict[str, str]]:
    """Return the messages of a number: a request, a tale, and up to two questions with their answers."""
    rng = random.Random(index)
    plot = rng.choice(_grammar()["plots"])
    slots = _cast(rng)
    slots["about"] = _fill(rng.choice(plot["about"]), slots, rng)
    told = [_fill(rng.choice(ways), slots, rng) for ways in (OPENINGS, *plot["beats"])]
    half = rng.choice([3, 4])
    breaks = rng.choice([" ", "\n\n"])
    text = " ".join(told[:half]) + breaks + " ".join(told[half:])
    messages = [_said("user", _fill(rng.choice(REQUESTS), slots, rng)), _said("assistant", text)]
    for ask, answer in rng.sample(plot["asks"], k=rng.choice([0, 0, 1, 2])):
        messages += [_said("user", _fill(ask, slots, rng)), _said("assistant", _fill(answer, slots, rng))]
    return messages


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@cache
def _grammar() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _cast(rng: random.Random) -> dict[str, str]:
    """Return the slots that all of a tale's sentences share."""
    words = _grammar()["words"]
    slots = {
        "thing": rng.choice(words["things"]),
        "food": rng.choice(words["foods"]),
        "place": rng.choice(words["places"]),
        "weather": rng.choice(words["weathers"]),
        "feeling": rng.choice(words["feelings"]),
        "seed": rng.choice(words["seeds"]),
        "skill": rng.choice(words["skills"]),
    }
    names = {gender: rng.sample(words[f"{gender}_names"], k=2) for gender in PRONOUNS}
    kinds = rng.sample(words["animals"] * 3 + words["grown_ups"] + words["children"] * 6, k=2)
    while kinds[0] == kinds[1]:
        kinds = rng.sample(words["animals"], k=2)
    adjectives = rng.sample(words["adjectives"], k=2)
    for number, (prefix, role) in enumerate((("", "hero"), ("f", "friend"))):
        kind = kinds[number]
        gender = {"girl": "she", "boy": "he", "postman": "he", "fisherman": "he"}.get(kind) or rng.choice(
            list(PRONOUNS)
        )
        he, him, his, himself = PRONOUNS[gender]
        slots |= {role: names[gender][number], f"{prefix}kind": kind, f"{prefix}little": adjectives[number]}
        slots |= {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his, f"{prefix}himself": himself}
    return slots


def _fill(pattern: str, slots: dict[str, str], rng: random.Random) -> str:
    """Return a sentence of a pattern: its choices made, its slots filled."""
    pattern = CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern)
    return SLOT.sub(lambda found: _slot(found[1], slots), pattern)


def _slot(name: str, slots: dict[str, str]) -> str:
    plain = name.lower()
    word = slots.get(plain) or _with_article(slots[plain.removeprefix("a_")])
    return word if name == plain else word[0].upper() + word[1:]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
