"""Tiny checkpoints on disk, with a token for each byte: random weights, so noise, but the same noise each time."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import NemotronHConfig, NemotronHForCausalLM

from freehold.checkpoint.save import save_checkpoint
from freehold.models.families import family_of_config
from models.tiny import LLAMA, NEMOTRON, Config, randomize, tiny_decoder

BYTES = {"vocab_size": 256}
TINY_LLAMA = LLAMA | BYTES
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_folder(
    folder: Path,
    config: Config = TINY_LLAMA,
    *,
    template: str | None = TEMPLATE,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of random weights as Freehold saves one."""

    def write_text_files(partial: Path) -> None:
        write_tokenizer(partial)
        if template is not None:
            (partial / "chat_template.jinja").write_text(template)

    decoder = tiny_decoder(config, dtype=dtype)
    save_checkpoint(folder, decoder, family=family_of_config(config), config=config, write_text_files=write_text_files)
    return folder


def write_nemotron(folder: Path) -> NemotronHForCausalLM:
    """Write a hybrid of every kind of block as transformers saves one, and return it, its steps unclamped.

    transformers clamps steps of prefill to 0.001 from below, which the published models were not trained with.
    """
    witness = NemotronHForCausalLM(NemotronHConfig(**(NEMOTRON | BYTES), eos_token_id=None)).eval()
    randomize(witness, seed=0)
    witness.save_pretrained(folder)
    write_tokenizer(folder)
    for module in witness.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return witness


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose token ids are the places of the bytes in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def change_config(folder: Path, **changes: object) -> Path:
    """Change keys of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
