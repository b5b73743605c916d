"""What licences say about training on outputs."""

from __future__ import annotations

import pytest

from registry import licences


@pytest.mark.parametrize(
    ("licence", "allows"),
    [
        ("apache-2.0", True),
        ("Apache License, Version 2.0", True),
        ("CC0-1.0", True),
        ("llama2", False),
        ("Llama 3", False),
        ("llama3.1", True),  # with a name that begins with Llama
        ("gemma", True),
        ("openai", False),
        ("other", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_known_of_a_licence(licence: str | None, allows: bool | None) -> None:
    assert licences.allows(licence) is allows


def test_each_entry_says_where_it_is_from() -> None:
    for name in licences.TERMS:
        terms = licences.terms(name.upper())
        assert terms is not None
        assert terms.said
        assert terms.source.startswith("https://")


def test_the_terms_of_an_endpoint() -> None:
    assert licences.of_endpoint("https://api.openai.com/v1#gpt-4o") == "openai"
    assert licences.of_endpoint("http://127.0.0.1:8000/v1#student") is None
