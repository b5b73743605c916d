"""The licence that the card of a model states."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.registry.catalog.model_licence import licence_of_card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: qwen\nlicense_link: LICENSE", "qwen"),
        ("license: other", "other"),
        ("tags: [a]", None),
        (None, None),
    ],
)
def test_the_licence_in_a_model_card(tmp_path: Path, card: str | None, licence: str | None) -> None:
    if card:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n\n# a model\n")
    assert licence_of_card(tmp_path) == licence
