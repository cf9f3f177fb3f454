"""One fleet of processes for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel.fleet import Fleet, running_fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(Path(tmp_path_factory.mktemp("fleet"))) as fleet:
        yield fleet
