"""Questions with the answers that people wrote, as conversations: rows of a training set and of a held-out one.

    PYTHON bench/instruction_rows.py TRAIN.jsonl HELD_OUT.jsonl

PYTHON has chatterbot-corpus (BSD): programs to write, science and general knowledge, in English.
"""

import json
import sys
from pathlib import Path

import chatterbot_corpus
import yaml

TOPICS = ("coding", "science", "trivia")
HELD_OUT_EVERY = 8  # this one of so many questions


def answers() -> dict[str, str]:
    """Return each question with its first answer, so that what is held out is never asked in training."""
    found: dict[str, str] = {}
    for topic in TOPICS:
        file = Path(chatterbot_corpus.__file__).parent / "data" / "english" / f"{topic}.yml"
        for question, answer, *_ in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            found.setdefault(question.strip(), str(answer).strip())
    return found


def row(question: str, answer: str) -> str:
    """Return a line of JSON as `freehold data build` reads it."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


if __name__ == "__main__":
    rows = [row(*pair) for pair in answers().items()]
    train, held_out = map(Path, sys.argv[1:])
    train.write_text("".join(line for number, line in enumerate(rows) if number % HELD_OUT_EVERY))
    held_out.write_text("".join(rows[::HELD_OUT_EVERY]))
