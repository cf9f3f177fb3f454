"""Short questions and their answers: animals, things, people, small numbers, talk, and what is too hard.

Each function returns one or two turns: what is asked, and the answer. What is said of the world comes from the tables
in words/, which were written by hand.
"""

import random
import tomllib
from functools import cache
from typing import Any

from grammar import ARTICLE, WORDS, filled, lines_of

Turn = tuple[str, str]

KNOW = "[I do not know that./I am sorry, I do not know.] [I am a very small model./A larger model can tell you that.]"
OFFER = "[Ask me for a story!/Shall I tell you a story?/I can tell you a story or talk a little./]"


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads((WORDS / "facts.toml").read_text(encoding="utf-8"))


def animal(rng: random.Random) -> list[Turn]:
    """One or two questions about an animal."""
    name, looks, food, home, habit = rng.choice(lines_of("animals.txt")).split(" | ")
    one = ARTICLE.sub(r"\1n", f"a {name}")
    first, it = one.capitalize(), rng.choice([f"The {name}", "It"])
    asked = [
        (f"what does {one} look like?", f"{first} has {looks}."),
        (f"what does {one} eat?", f"{first} eats {food}."),
        (f"where does {one} live?", f"{first} lives {home}."),
        (f"what can {one} do?", f"{first} {habit}."),
        (f"what is {one}?", f"{first} is an animal with {looks}. It {habit}."),
        (f"tell me about the {name}.", f"{first} has {looks}. {it} lives {home} and eats {food}."),
        (f"what do you know about the {name}?", f"The {name} lives {home}. It {habit}."),
        (f"describe {one}", f"{first} has {looks}. {it} {habit}."),
    ]
    return rng.sample(asked, rng.choice([1, 1, 2]))


def thing(rng: random.Random) -> list[Turn]:
    """A question about a common thing."""
    name, what, more = rng.choice(lines_of("subjects.txt")).split(" | ")
    asked = rng.choice(
        [
            *(f"what is {name}?", f"what is {name}?", f"tell me about {name}.", f"describe {name}."),
            *(f"can you explain what {name} is?", f"what do you know about {name}?"),
        ]
    )
    return [(asked, f"{what} {more}" if rng.random() < 0.8 else what)]


def person(rng: random.Random) -> list[Turn]:
    """A question about what somebody does."""
    who, work = rng.choice(_facts()["people"])
    return [
        rng.choice(
            [
                (f"what does {who} do?", f"{who.capitalize()} {work}."),
                (f"who is {who}?", f"{who.capitalize()} is somebody who {work}."),
                (f"who {work}?", f"{who.capitalize()} {work}."),
            ]
        )
    ]


def little_fact(rng: random.Random) -> list[Turn]:
    """Opposites, colours, weather, what comes after what."""
    facts = _facts()
    one, other = rng.sample(rng.choice(facts["opposites"]).split(), 2)
    what, colour = rng.choice(facts["colours"])
    weather, ideas = rng.choice(list(facts["weather"].items()))
    first, second = rng.sample(ideas, 2)
    names = facts[rng.choice(["days", "months"])]
    place = rng.randrange(len(names))
    return [
        rng.choice(
            [
                (f"what is the opposite of {one}?", f"The opposite of {one} is {other}."),
                (f"what colour is {what}?", f"{what.capitalize()} is {colour}."),
                (f"what can I do when it is {weather}?", f"On a {weather} day you can {first} or {second}."),
                (f"what comes after {names[place - 1]}?", f"After {names[place - 1]} comes {names[place]}."),
                (f"what comes before {names[place]}?", f"Before {names[place]} comes {names[place - 1]}."),
            ]
        )
    ]


def small_sum(rng: random.Random) -> list[Turn]:
    """Adding and counting, up to ten."""
    words = _facts()["numbers"]
    first = rng.randint(0, 10)
    second = rng.randint(0, 10 - first)
    a, b, total = words[first], words[second], words[first + second]
    last = rng.randint(3, 10)
    name, fruit = rng.choice(["Mia", "Tom", "Ben", "Lily", "Anna"]), rng.choice(["apples", "pears", "shells", "nuts"])
    return [
        rng.choice(
            [
                (f"what is {a} plus {b}?", f"{a.capitalize()} plus {b} is {total}."),
                (f"what is {first} + {second}?", f"{first} + {second} = {first + second}."),
                (
                    f"{name} has {a} {fruit} and gets {b} more. How many {fruit} does {name} have?",
                    f"{name} has {total} {fruit}.",
                ),
                (f"count to {words[last]}", f"{', '.join(words[1:last]).capitalize()} and {words[last]}."),
            ]
        )
    ]


@cache
def _talk() -> list[tuple[list[str], list[str]]]:
    """Return groups of what is said and what is answered."""
    groups = "\n".join(lines_of("talk.txt")).split("== ")[1:]
    parts = [group.strip().split("\n", 1)[1].split("\n--\n") for group in groups]
    return [
        (said.replace("\n", " | ").split(" | "), answers.replace("\n", " | ").split(" | ")) for said, answers in parts
    ]


def small_talk(rng: random.Random) -> list[Turn]:
    """Something that people say in a chat."""
    said, answers = rng.choice(_talk())
    return [(rng.choice(said), filled(rng.choice(answers), rng, {}))]


def too_hard(rng: random.Random) -> list[Turn]:
    """A question that so small a model cannot answer."""
    forms = rng.choice(lines_of("unknown.txt")).split(" | ")
    drawn = {
        "country": rng.choice(_facts()["countries"]),
        "number": str(rng.randint(11, 99)),
        "number2": str(rng.randint(10, 99)),
    }
    return [(filled(rng.choice(forms), rng, drawn), f"{filled(KNOW, rng, {})} {filled(OFFER, rng, {})}".strip())]
