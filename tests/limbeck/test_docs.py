"""The documents name files that exist, and link to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
FOLDERS = ("distill", "docs", "evals", "export", "limbeck", "quickstart", "registry", "tests", "web")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
LINK = re.compile(r"\]\(((?!https?:|#)[^)#]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    assert [path for path in PATH.findall(text) if "ROOM" not in path and not (ROOT / path).exists()] == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []
