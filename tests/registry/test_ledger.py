"""The ledger of alias moves: what was done to it, or past it, is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from registry import ledger
from registry.errors import BadInput
from registry.ledger import ENTRY, Ledger
from registry.records import LedgerEntry
from registry.store import Store
from tests.registry.conftest import Still


def move(still: Still, to: int | None, before: int | None = None, **changes: Any) -> LedgerEntry:
    """Write an entry and carry it out."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=before, to_version=to, artifact=None,
        verdict=None, reason="",
    )  # fmt: skip
    entry = ledger.append(still.store, "still", **fields | changes)
    ledger.apply(still.store, entry)
    return entry


@pytest.fixture
def moved(still: Still) -> Still:
    """`production` went to 3, 4 and 5; `staging` to 3."""
    move(still, 3)
    move(still, 4, 3)
    move(still, 3, alias="staging")
    move(still, 5, 4)
    return still


def tags(store: Store) -> dict[str, str]:
    """The entries' tags, first to last."""
    every = store.client.get_registered_model("still").tags
    return {key: every[key] for key in sorted(every) if key.startswith(ENTRY)}


def problems(still: Still) -> str:
    return "\n".join(ledger.read(still.store, "still").problems())


def test_entries_are_chained(moved: Still) -> None:
    book = ledger.read(moved.store, "still")
    assert [(e.sequence, e.alias, e.from_version, e.to_version) for e in book.entries] == [
        (1, "production", None, 3),
        (2, "production", 3, 4),
        (3, "staging", None, 3),
        (4, "production", 4, 5),
    ]
    assert [entry.previous for entry in book.entries] == ["", *(entry.hash for entry in book.entries[:-1])]
    assert len({entry.hash for entry in book.entries}) == 4
    assert book.aliases == {"production": 5, "staging": 3}
    assert book.history("production") == [3, 4, 5]
    assert book.problems() == []
    assert ledger.entries(moved.store, "still") == book.entries


def changed(store: Store, number: int, edit: Callable[[str], str]) -> None:
    key, value = list(tags(store).items())[number]
    store.client.set_registered_model_tag("still", key, edit(value))


@pytest.mark.parametrize("number", [0, 3])
def test_a_changed_entry(moved: Still, number: int) -> None:
    changed(moved.store, number, lambda value: value.replace('"who":"me"', '"who":"you"'))
    assert f"entry {number + 1} was changed: its hash does not fit" in problems(moved)


@pytest.mark.parametrize("number", range(4))
def test_a_dropped_entry(moved: Still, number: int) -> None:
    moved.store.client.delete_registered_model_tag("still", list(tags(moved.store))[number])
    assert "is missing" in problems(moved) or "something is missing" in problems(moved)


def test_reordered_entries(moved: Still) -> None:
    keys = list(tags(moved.store))
    values = tags(moved.store)
    moved.store.client.set_registered_model_tag("still", keys[0], values[keys[1]])
    moved.store.client.set_registered_model_tag("still", keys[1], values[keys[0]])
    assert problems(moved).count("is in the place of another") == 2
    entries = ledger.entries(moved.store, "still")
    swapped = [entries[1], entries[0], *entries[2:]]
    assert any("does not follow the one before" in problem for problem in ledger.verify(swapped))
    assert any("stands in place 1" in problem for problem in ledger.verify(swapped))


def test_a_doubled_and_an_unreadable_entry(moved: Still) -> None:
    key, value = list(tags(moved.store).items())[1]
    moved.store.client.set_registered_model_tag("still", key + "x", value)
    assert "2 entries have the number 2" in problems(moved)
    moved.store.client.set_registered_model_tag("still", key + "x", "no entry")
    assert "cannot be read" in problems(moved)


def test_a_forged_entry_has_to_fit_the_moves(moved: Still) -> None:
    """A whole chain written anew, with hashes that fit, but moves that do not."""
    forged = move(moved, 3, before=2)
    assert f"entry {forged.sequence} moves production from version 2, where it was at version 5" in problems(moved)


def test_an_alias_moved_through_mlflow(moved: Still) -> None:
    moved.store.client.set_registered_model_alias("still", "production", "1")
    said = "production points at version 1, but the ledger says version 5: somebody moved it through MLflow itself"
    assert problems(moved) == said
    book = ledger.read(moved.store, "still")
    assert book.problems("staging") == []
    assert book.problems("production") == [said]
    moved.store.client.delete_registered_model_alias("still", "production")
    assert "production points at no version" in problems(moved)


def test_adopting_it(moved: Still) -> None:
    store = moved.store
    assert ledger.adopt(store, "still", "production", who="me", reason="") is None  # nothing to adopt
    store.client.set_registered_model_alias("still", "production", "1")
    entry = ledger.adopt(store, "still", "production", who="me", reason="so be it")
    assert (entry.action, entry.from_version, entry.to_version) == ("adopt", 5, 1)
    assert (entry.artifact, entry.reason) == (moved.teacher.digest, "so be it")
    assert problems(moved) == ""
    assert ledger.read(store, "still").history("production") == [3, 4, 5, 1]


def test_an_alias_that_the_ledger_does_not_know(moved: Still) -> None:
    moved.store.client.set_registered_model_alias("still", "canary", "1")
    book: Ledger = ledger.read(moved.store, "still")
    assert book.problems() == []  # none of ours
    assert book.problems("canary") == [
        "canary points at version 1, but the ledger knows nothing of it: somebody moved it through MLflow itself"
    ]


def unfinished(still: Still, **changes: Any) -> LedgerEntry:
    """An entry of a process that was killed before it moved the alias."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=5, to_version=3, artifact=None, verdict=None,
        reason="",
    )  # fmt: skip
    return ledger.append(still.store, "still", **fields | changes)


def test_settling_what_was_not_carried_out(moved: Still) -> None:
    store = moved.store
    assert ledger.settle(store, "still", who="me") == []
    entry = unfinished(moved)
    assert ledger.read(store, "still").unfinished("production") == entry
    assert problems(moved) == ""  # between the two steps nothing is wrong
    assert ledger.settle(store, "still", who="me") == [entry]
    assert store.aliases("still")["production"] == 3
    assert ledger.read(store, "still").unfinished("production") is None
    # Killed between the move and its mark: the mark alone is made.
    entry = unfinished(moved, from_version=3, to_version=4)
    store.client.set_registered_model_alias("still", "production", "4")
    assert ledger.settle(store, "still", who="me") == [entry]
    assert problems(moved) == ""


@pytest.mark.parametrize(("action", "undone"), [("promote", "rollback"), ("rollback", "adopt")])
def test_settling_over_damaged_files(moved: Still, action: str, undone: str) -> None:
    store = moved.store
    target = 3 if action == "promote" else 4
    entry = unfinished(moved, action=action, to_version=target)
    (store.folder(store.get(f"still/{target}")) / "model.onnx").write_text("damaged")
    (settled,) = ledger.settle(store, "still", who="you")
    assert (settled.action, settled.from_version, settled.to_version, settled.who) == (undone, target, 5, "you")
    assert f"entry {entry.sequence} was never carried out: " in settled.reason
    book = ledger.read(store, "still")
    assert (book.aliases["production"], book.history("production")[-1], book.problems()) == (5, 5, [])
    assert ledger.settle(store, "still", who="you") == []


def test_settling_leaves_what_somebody_else_moved(moved: Still) -> None:
    unfinished(moved)
    moved.store.client.set_registered_model_alias("still", "production", "1")
    assert ledger.settle(moved.store, "still", who="me") == []
    assert moved.store.aliases("still")["production"] == 1
    assert "production points at version 1, but the ledger says version 3" in problems(moved)


def test_two_machines_writing_at_once(moved: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock reaches over machines: the one that sees another entry of its number gives way."""
    other = ledger.entries(moved.store, "still")
    real, calls = ledger.entries, []

    def late(store: Store, name: str) -> list[LedgerEntry]:
        calls.append(name)
        return other if len(calls) == 1 else real(store, name)

    first = unfinished(moved)  # the other machine's, written after we read
    monkeypatch.setattr(ledger, "entries", late)
    second = unfinished(moved, from_version=3, to_version=4)
    assert (first.sequence, second.sequence, second.previous) == (5, 6, first.hash)
    assert ledger.verify(real(moved.store, "still")) == []


def test_reasons_and_names(still: Still) -> None:
    with pytest.raises(BadInput, match="2001 characters, at most 2000"):
        unfinished(still, reason="x" * 2001)
    longest = unfinished(still, from_version=None, reason="\u2620" * 2000)
    assert ledger.entries(still.store, "still") == [longest]
    with pytest.raises(BadInput, match="did you mean still"):
        ledger.read(still.store, "stil")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "", "a b", "a/b", "a@b", "../x", "1st", "x" * 101])
def test_aliases_that_cannot_be_used(alias: str) -> None:
    with pytest.raises(BadInput, match="alias"):
        ledger.check_alias(alias)


@pytest.mark.parametrize("alias", ["production", "v1-candidate", "a_b-C", "x" * 100])
def test_aliases_that_can(alias: str) -> None:
    ledger.check_alias(alias)
