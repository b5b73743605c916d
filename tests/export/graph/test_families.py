"""Every family of the README's table: exported, held against PyTorch, and as the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT
from tests.families import FAMILIES, MARKS, Family, row, table, try_family

README = ROOT / "README.md"


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_gives_what_pytorch_gives_and_is_in_the_readme(
    family: Family, tokenizer_folder: Path, tmp_path: Path
) -> None:
    graph, parity = try_family(family, tokenizer_folder, tmp_path)
    assert parity.passed
    assert parity.max_logprob_diff < 1e-4
    assert parity.greedy_identical
    if MARKS[0] in README.read_text():
        assert row(family, graph) in README.read_text()


def test_the_readme_has_no_other_families() -> None:
    text = README.read_text()
    if MARKS[0] not in text:
        pytest.skip("the README has no table of families")
    written = text[text.index(MARKS[0]) : text.index(MARKS[1])].strip().splitlines()
    assert len(written) == len(table(row(family, "") for family in FAMILIES).splitlines()) - 1
