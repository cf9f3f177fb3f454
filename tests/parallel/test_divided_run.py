"""Training in a divided model: steps report what one process does, and its checkpoint is that of one process."""

from pathlib import Path

import pytest
from parallel.divided import ulps
from parallel.divided_run import train, train_alone
from parallel.fleet import Fleet
from safetensors.torch import load_file

from freehold.parallel.processes import Sizes
from models.tiny import MTP, QWEN

LENGTHS = (19, 1, 2, 2, 7, 1)
CLOSE = 1e-5  # relative; rounding that three steps have made more of
MAX_ULPS = 64

RUNS = {
    "tensor-2-data-2": (Sizes(tensor=2), MTP, False),
    "tensor-2-sharded-over-2": (Sizes(tensor=2), MTP, True),
    "expert-2-context-2": (Sizes(expert=2, context=2), MTP, False),
    "expert-2-sharded-over-2": (Sizes(expert=2), MTP, True),
    "context-2-tensor-2-tied": (Sizes(context=2, tensor=2), QWEN | {"tie_word_embeddings": True}, False),
}


@pytest.mark.parametrize(("sizes", "config", "is_sharded"), RUNS.values(), ids=RUNS)
def test_a_divided_run_is_that_of_one_process(
    fleet: Fleet, tmp_path: Path, sizes: Sizes, config: dict, is_sharded: bool
):
    expected = train_alone(config, LENGTHS, tmp_path / "alone")
    for reports in fleet.run(train, sizes, config, LENGTHS, is_sharded, tmp_path / "together"):
        for found, wanted in zip(reports, expected, strict=True):
            assert found["mtp_losses"] == pytest.approx(wanted["mtp_losses"], rel=CLOSE)
            numbers = [{k: v for k, v in report.items() if k != "mtp_losses"} for report in (found, wanted)]
            assert numbers[0] == pytest.approx(numbers[1], rel=CLOSE)
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    assert together.keys() == alone.keys()
    assert {name: far for name in alone if (far := ulps(together[name], alone[name])) > MAX_ULPS} == {}
