"""Sentences from forms and word lists: what is written for freehold-pico by chance, from a seeded generator.

A form is a text in which [this/or that] is a choice, $word a word of the story, and " | " stands between whole forms.
The words of a story: $name is its hero ($who: "shy fox", $kind: "fox", $nature: "shy", $he, $his, $him, $himself), and
$friend the other one ($fkind, $nature2, $he2, $his2, $him2), $okind a third; $at ("by the river"), $place ("forest",
which one is in), $day ("one evening"); and a word of a list each: $thing, $colour, $food, $weather, $feeling, $seed,
$skill.
"""

import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORDS = Path(__file__).with_name("words")
CHOICE = re.compile(r"\[([^][]*)\]")
VARIABLE = re.compile(r"\$(\w+)")
ARTICLE = re.compile(r"\b([Aa])(?= (?!one|use|uni|eu)[aeiou])")
FIRST_LETTER = re.compile(r'(^"?|[.!?] "?)([a-z])')
PRONOUNS = {"girls": ("she", "her", "her", "herself"), "boys": ("he", "his", "him", "himself")}
NAMES_OF_KINDS = {
    **dict.fromkeys(("girl", "woman", "queen", "princess", "grandmother", "mermaid", "witch", "hen", "cow"), "girls"),
    **dict.fromkeys(("boy", "man", "king", "prince", "grandfather", "postman", "fisherman", "cowboy"), "boys"),
}
# Words of a story that are drawn from a list each.
DRAWN = {
    **{"thing": "things", "colour": "colours", "food": "foods", "at": "places", "place": "regions", "day": "mornings"},
    **{"skill": "skills", "weather": "weathers", "feeling": "feelings", "seed": "seeds"},
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What happens, sentence by sentence. Each line is its forms; optional ones are in half of the stories.

    questions: each with its answer behind it, that the story's text answers.
    """

    themes: tuple[str, ...]
    is_for_all: bool
    lines: tuple[tuple[bool, tuple[str, ...]], ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story and what it is about: the words that its forms were filled with, $theme among them, and its questions."""

    sentences: tuple[str, ...]
    words: Mapping[str, str]
    questions: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@cache
def words(name: str) -> tuple[str, ...]:
    """Return one of the word lists."""
    lists = tomllib.loads((WORDS / "lists.toml").read_text(encoding="utf-8"))
    return tuple(word.strip() for word in lists[name].replace("\n", " ").split(","))


@cache
def lines_of(name: str) -> list[str]:
    """Return the lines of a file of words, without its comments."""
    lines = (WORDS / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@cache
def plots() -> tuple[Plot, ...]:
    """Return all plots."""
    blocks = "\n".join(lines_of("stories.txt")).split("== ")[1:]
    return tuple(_plot(*block.strip().split("\n")) for block in blocks)


def _plot(head: str, *lines: str) -> Plot:
    themes, _, cast = head.partition(" ; ")
    told = [line for line in lines if not line.startswith("! ")]
    return Plot(
        themes=tuple(themes.split(" | ")),
        is_for_all=cast == "all",
        lines=tuple((line.startswith("? "), tuple(line.removeprefix("? ").split(" | "))) for line in told),
        questions=tuple(line.removeprefix("! ") for line in lines if line.startswith("! ")),
    )


def filled(form: str, rng: random.Random, values: Mapping[str, str], *, is_sentence: bool = True) -> str:
    """Return the text of a form: choices made, words put in, articles set right, and the first letters of sentences."""
    text = CHOICE.sub(lambda match: rng.choice(match[1].split("/")), form)
    text = VARIABLE.sub(lambda match: values[match[1]], text)
    text = ARTICLE.sub(r"\1n", text)
    return FIRST_LETTER.sub(lambda match: match[1] + match[2].upper(), text) if is_sentence else text


def tell(rng: random.Random) -> Story:
    """Return a story."""
    plot = rng.choice(plots())
    values = _cast(rng, plot)
    values["theme"] = filled(rng.choice(plot.themes), rng, values, is_sentence=False)
    told = [rng.choice(forms) for is_optional, forms in plot.lines if not is_optional or rng.random() < 0.5]
    sentences = tuple(filled(form, rng, values) for form in told)
    return Story(sentences=sentences, words=values, questions=plot.questions)


def _cast(rng: random.Random, plot: Plot) -> dict[str, str]:
    """Return the words of a new story."""
    kinds = words("animals") + (words("people") if plot.is_for_all else ())
    kind, friend_kind, other_kind = rng.sample(kinds, 3)
    nature, friend_nature = rng.sample(words("natures"), 2)
    name, he, his, him, himself = _named(rng, kind)
    friend, he2, his2, him2, _ = _named(rng, friend_kind)
    while friend == name:
        friend, he2, his2, him2, _ = _named(rng, friend_kind)
    return {
        **{word: rng.choice(words(listed)) for word, listed in DRAWN.items()},
        **{"name": name, "kind": kind, "nature": nature, "who": f"{nature} {kind}"},
        **{"he": he, "his": his, "him": him, "himself": himself, "He": he.title(), "His": his.title()},
        **{"friend": friend, "fkind": friend_kind, "nature2": friend_nature, "okind": other_kind},
        **{"he2": he2, "his2": his2, "him2": him2, "He2": he2.title(), "His2": his2.title()},
    }


def _named(rng: random.Random, kind: str) -> tuple[str, str, str, str, str]:
    """Return a name for somebody of a kind, and the pronouns that go with it."""
    names = NAMES_OF_KINDS.get(kind) or rng.choice(list(PRONOUNS))
    return rng.choice(words(names)), *PRONOUNS[names]
