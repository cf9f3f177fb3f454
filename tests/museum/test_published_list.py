"""docs/museum.md is what others read of this museum: it names every test here, and none that is not there."""

import re
from pathlib import Path

from sources import ROOT

LIST = (ROOT / "docs" / "museum.md").read_text()


def test_the_published_list_names_every_test_and_nothing_else():
    here = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    named = set(re.findall(r"`(test_\w+\.py)`", LIST))
    assert named == here
    assert [path for path in re.findall(r"`(tests/[\w/]+\.py)`", LIST) if not (ROOT / path).exists()] == []


def test_every_number_in_the_list_is_explained_by_a_test():
    told = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    native = {"CVE-2024-23605", "CVE-2025-53630", "CVE-2026-27940"}  # whose tests are not here
    assert set(re.findall(r"CVE-\d+-\d+", LIST)) - native <= set(re.findall(r"CVE-\d+-\d+", told))
