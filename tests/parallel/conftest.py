"""A fleet of processes for the tests of a file; it ends with them, for its threads look for work and slow all else."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel.fleet import Fleet, running_fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(Path(tmp_path_factory.mktemp("fleet"))) as fleet:
        yield fleet
