"""Small questions and their answers, from our own tables (facts.toml) and a number: the same in every run.

What a model of this size can hold: animals, things, opposites, small numbers, days, how to greet, and to say that it
does not know.
"""

import random
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

Exchange = tuple[str, str]


def fact(index: int) -> list[dict[str, str]]:
    """Return the messages of a number: one to three questions, each with its answer."""
    rng = random.Random(index)
    messages = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        question, answer = rng.choices(list(KINDS), weights=list(KINDS.values()))[0](rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _animal(rng: random.Random) -> Exchange:
    name, (sound, food, home, young, what) = rng.choice(list(_tables()["animals"].items()))
    one = _with_article(name)
    return rng.choice(
        [
            (f"What sound does {one} make?", f"{_capital(one)} makes {_with_article(sound)} sound."),
            (f"What does {one} say?", f"{_capital(one)} says {sound}."),
            (f"What does {one} eat?", f"{_capital(one)} eats {food}."),
            (f"Where does {one} live?", f"{_capital(one)} lives {home}."),
            (f"What is a young {name} called?", f"A young {name} is called {_with_article(young)}."),
            (f"What is {one}?", f"{_capital(one)} is {what}."),
            (f"Tell me about {one}.", f"{_capital(one)} is {what}. It lives {home} and eats {food}."),
        ]
    )


def _thing(rng: random.Random) -> Exchange:
    name, (what, use) = rng.choice(list(_tables()["things"].items()))
    one = _with_article(name)
    return rng.choice(
        [
            (f"What is {one}?", f"{_capital(one)} is {what}. You use it {use}."),
            (f"What is {one} for?", f"You use {one} {use}."),
            (f"What can I do with {one}?", f"You can use it {use}."),
            (f"Why do people need {one}?", f"People need {one} {use}."),
            (f"Tell me about {one}.", f"{_capital(one)} is {what}. People use it {use}."),
        ]
    )


def _person(rng: random.Random) -> Exchange:
    name, (work,) = rng.choice(list(_tables()["people"].items()))
    one = _with_article(name)
    return rng.choice(
        [
            (f"What does {one} do?", f"{_capital(one)} {work}."),
            (f"Who is {one}?", f"{_capital(one)} is somebody who {work}."),
            (f"Who {work}?", f"{_capital(one)} {work}."),
        ]
    )


def _opposite(rng: random.Random) -> Exchange:
    pair = rng.choice(_tables()["opposites"]["pairs"]).split()
    rng.shuffle(pair)
    answer = f"The opposite of {pair[0]} is {pair[1]}."
    return rng.choice(
        [(f"What is the opposite of {pair[0]}?", answer), (f"Tell me the opposite of {pair[0]}.", answer)]
    )


def _color(rng: random.Random) -> Exchange:
    what, color = rng.choice(_tables()["colors"]["of"]).rsplit(" ", 1)
    return f"What color is {what}?", f"{_capital(what)} is {color}."


def _weather(rng: random.Random) -> Exchange:
    weather, ideas = rng.choice(list(_tables()["weather"].items()))
    first, second = rng.sample(ideas, k=2)
    question = rng.choice([f"It is {weather} today.", f"What can I do when it is {weather}?"])
    return question, f"On a {weather} day you can {first} or {second}."


def _feeling(rng: random.Random) -> Exchange:
    feeling, answer = rng.choice(list(_tables()["feelings"].items()))
    said = [
        f"I am {feeling}.",
        f"I feel {feeling} today.",
        f"What can I do when I am {feeling}?",
        f"I am so {feeling}!",
    ]
    return rng.choice(said), answer


def _sum(rng: random.Random) -> Exchange:
    words = _tables()["numbers"]["words"]
    first = rng.randint(0, 10)
    second = rng.randint(0, 10 - first)
    name, thing = rng.choice(["Mia", "Tom", "Ben", "Lily", "Anna"]), rng.choice(["apples", "pears", "shells", "nuts"])
    total = words[first + second]
    return rng.choice(
        [
            (
                f"What is {words[first]} plus {words[second]}?",
                f"{_capital(words[first])} plus {words[second]} is {total}.",
            ),
            (f"What is {first} + {second}?", f"{first} + {second} = {first + second}."),
            (
                f"{name} has {words[first]} {thing} and gets {words[second]} more. How many {thing} does {name} have?",
                f"{name} has {total} {thing}.",
            ),
        ]
    )


def _order(rng: random.Random) -> Exchange:
    row = rng.choice(["days", "months"])
    names = _tables()["numbers"][row]
    place = rng.randrange(len(names))
    here, after, before = names[place], names[(place + 1) % len(names)], names[place - 1]
    return rng.choice(
        [
            (f"What comes after {here}?", f"After {here} comes {after}."),
            (f"What comes before {here}?", f"Before {here} comes {before}."),
        ]
    )


def _count(rng: random.Random) -> Exchange:
    words = _tables()["numbers"]["words"]
    last = rng.randint(3, 10)
    return f"Count to {words[last]}.", f"{_capital(', '.join(words[1:last]))} and {words[last]}."


def _talk(rng: random.Random) -> Exchange:
    talk = _tables()["talk"]
    asked, answered = rng.choice(
        [
            ("greetings", "greeted"),
            ("who", "am"),
            ("who", "am"),
            ("can", "able"),
            ("thanks", "thanked"),
            ("bye", "left"),
            ("hard", "unknown"),
        ]
    )
    return rng.choice(talk[asked]), rng.choice(talk[answered])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


KINDS: dict[Callable[[random.Random], Exchange], float] = {
    _animal: 4,
    _thing: 3,
    _person: 1.5,
    _opposite: 1.5,
    _color: 1,
    _weather: 1,
    _feeling: 1.5,
    _sum: 2,
    _order: 1,
    _count: 0.5,
    _talk: 4,
}
