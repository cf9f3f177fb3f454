"""One server for all of the museum that needs a process of its own: a hybrid model from a folder that means harm."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.folders import change_config, write_folder
from models.tiny import NEMOTRON
from museum.witness import Witnessed, witnessed_server


class Harm:
    """Runs code where it is unpickled."""

    def __init__(self, code: str):
        self._code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self._code,)


def write_harmful_folder(into: Path) -> Path:
    """Write a model that brings code of its own in every way that loaders have fallen for.

    Wherever that code runs, it leaves a file named "harm" beside the folder.
    """
    folder = write_folder(into / "tiny", NEMOTRON | {"vocab_size": 256, "max_position_embeddings": 4096})
    code = f"open({str(into / 'harm')!r}, 'w').close()"
    auto_map = {f"Auto{kind}": "harm.Harm" for kind in ("Config", "Model", "ModelForCausalLM", "Tokenizer")}
    change_config(folder, auto_map=auto_map)
    for name in ("harm.py", "__init__.py", "tokenization_harm.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Harm(code)))
    return folder


@pytest.fixture(scope="session")
def witnessed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witnessed]:
    """Yield a server whose every act is written down."""
    into = tmp_path_factory.mktemp("museum")
    with witnessed_server(write_harmful_folder(into), into) as served:
        yield served
