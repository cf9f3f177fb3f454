"""Train freehold-pico's tokenizer: `python tokenizer.py ROWS... FOLDER`, byte-level BPE of the words that occur.

The first ids are the special tokens of Nemotron 3 under its names. A text ends with </s>, a turn with <|im_end|>.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = """
<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]
<|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response>
""".split()
END_OF_TEXT, END_OF_TURN = "</s>", "<|im_end|>"
VOCAB_SIZE = 3072
LEAST_FREQUENCY = 20  # of a pair of tokens that is made one


def texts(files: Sequence[Path]) -> Iterator[str]:
    """Yield what is written in rows, whoever says it."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield from [row["text"]] if "text" in row else (message["content"] for message in row["messages"])


def train(files: Sequence[Path]) -> Tokenizer:
    """Return a tokenizer of the text in some files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=LEAST_FREQUENCY,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(files), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer and its chat template as Hugging Face's libraries and Freehold read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END_OF_TURN)]
    generation = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("chat_template.jinja"), folder / "chat_template.jinja")


if __name__ == "__main__":
    *rows, out = map(Path, sys.argv[1:])
    save(train(rows), out)
