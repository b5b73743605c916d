"""The ledger of alias moves: what was done to it, or past it, is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.ledger import anchor, log
from limbeck.registry.ledger.chain import (
    APPLIED_TAG_PREFIX,
    ENTRY_TAG_PREFIX,
    MOVING_MARK_PREFIX,
    Ledger,
    compute_entry_hash,
    entry_tag,
)
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import LedgerEntry
from tests.registry.conftest import Still


def move(still: Still, to: int | None, before: int | None = None, **changes: Any) -> LedgerEntry:
    """Write an entry and carry it out."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=before, to_version=to, artifact=None,
        verdict=None, reason="",
    )  # fmt: skip
    entry = log.append_entry(still.store, "still", **fields | changes)
    log.apply_entry(still.store, entry)
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
    return {key: every[key] for key in sorted(every) if key.startswith(ENTRY_TAG_PREFIX)}


def problems(still: Still) -> str:
    return "\n".join(log.read_ledger(still.store, "still").problems())


def test_entries_are_chained(moved: Still) -> None:
    book = log.read_ledger(moved.store, "still")
    assert [(e.sequence, e.alias, e.from_version, e.to_version) for e in book.entries] == [
        (1, "production", None, 3),
        (2, "production", 3, 4),
        (3, "staging", None, 3),
        (4, "production", 4, 5),
    ]
    assert [entry.previous for entry in book.entries] == ["", *(entry.hash for entry in book.entries[:-1])]
    assert len({entry.hash for entry in book.entries}) == 4
    assert book.aliases == {"production": 5, "staging": 3}
    assert book.version_history("production") == [3, 4, 5]
    assert book.problems() == []
    assert log.read_entries(moved.store, "still") == book.entries


def changed(store: Store, number: int, edit: Callable[[str], str]) -> None:
    key, value = list(tags(store).items())[number]
    store.client.set_registered_model_tag("still", key, edit(value))


@pytest.mark.parametrize("number", [0, 3])
def test_a_changed_entry(moved: Still, number: int) -> None:
    changed(moved.store, number, lambda value: value.replace('"who":"me"', '"who":"you"'))
    assert f"entry {number + 1} was changed: its hash is" in problems(moved)


@pytest.mark.parametrize("numbers", [(0,), (1,), (2, 3), (3,), (0, 1, 2, 3)])
def test_dropped_entries(moved: Still, numbers: tuple[int, ...]) -> None:
    """The last ones and all of them, too, with their marks: the anchor knows them still."""
    every = list(tags(moved.store))
    for number in numbers:
        moved.store.client.delete_registered_model_tag("still", every[number])
    for alias in ("production", "staging"):
        moved.store.client.delete_registered_model_tag("still", APPLIED_TAG_PREFIX + alias)
    assert {f"entry {n + 1} ({every[n].rpartition('.')[2][:12]}) is missing" for n in numbers} <= {
        problem for problem in problems(moved).split("\n") if "is missing" in problem
    }


def test_reordered_entries(moved: Still) -> None:
    keys = list(tags(moved.store))
    values = tags(moved.store)
    moved.store.client.set_registered_model_tag("still", keys[0], values[keys[1]])
    moved.store.client.set_registered_model_tag("still", keys[1], values[keys[0]])
    assert problems(moved).count("is in the place of another") == 2


def test_a_doubled_and_an_unreadable_entry(moved: Still) -> None:
    key, value = list(tags(moved.store).items())[1]
    for double in (key + "x", key.replace("000002", "000005"), key.replace("000002", "000009"), ENTRY_TAG_PREFIX + "x"):
        moved.store.client.set_registered_model_tag("still", double, value)
        place = double.removeprefix(ENTRY_TAG_PREFIX)
        assert problems(moved) == f"the entry {place} was never written to the ledger: the anchor does not know it"
        moved.store.client.delete_registered_model_tag("still", double)
    moved.store.client.set_registered_model_tag("still", key, "no entry")
    assert "cannot be read" in problems(moved)


def test_a_chain_that_was_written_anew(moved: Still) -> None:
    """Every hash fits, and so does each entry the one before: but they are not what was entered."""
    store, previous = moved.store, ""
    for key, value in tags(store).items():
        entry = LedgerEntry.model_validate_json(value).model_copy(update={"who": "you", "previous": previous})
        entry = entry.model_copy(update={"hash": compute_entry_hash(entry)})
        store.client.delete_registered_model_tag("still", key)
        store.client.set_registered_model_tag("still", entry_tag(entry.sequence, entry.hash), entry.model_dump_json())
        previous = entry.hash
    for alias in ("production", "staging"):
        store.client.delete_registered_model_tag("still", APPLIED_TAG_PREFIX + alias)
    assert problems(moved).count("is missing") == problems(moved).count("was never written to the ledger") == 4


def test_a_run_that_was_deleted(moved: Still) -> None:
    """MLflow keeps what it says, and takes nothing more."""
    book = log.read_ledger(moved.store, "still")
    assert book.anchor is not None
    moved.store.client.delete_run(book.anchor.run_id)
    assert problems(moved) == f"the MLflow run {book.anchor.run_id}, which anchors the ledger, was deleted"
    with pytest.raises(BadInput, match=f"mlflow runs restore --run-id {book.anchor.run_id}"):
        move(moved, 3, 5)
    moved.store.client.restore_run(book.anchor.run_id)
    assert problems(moved) == ""
    moved.store.client.set_experiment_tag(
        moved.store.client.get_experiment_by_name(anchor.EXPERIMENT).experiment_id,
        anchor.ROOT_RUN_TAG,
        book.anchor.run_id,
    )
    moved.store = Store()
    assert f"entry 1 is anchored in the run {book.anchor.run_id}, the ledger in none" in problems(moved)


def test_a_ledger_whose_anchor_is_gone_takes_no_entry(moved: Still) -> None:
    """Its entries are still listed, each with a problem: nobody can start a new chain over them."""
    experiment = moved.store.client.get_experiment_by_name(anchor.EXPERIMENT).experiment_id
    moved.store.client.rename_experiment(experiment, "elsewhere")
    moved.store = Store()
    ledger = log.read_ledger(moved.store, "still")
    assert [entry.sequence for entry in ledger.entries] == [1, 2, 3, 4]
    assert problems(moved).count(f"is anchored in the run {ledger.entries[0].anchor}, the ledger in none") == 4
    with pytest.raises(BadInput, match="has entries, but its anchor is gone"):
        move(moved, 3, 5)
    assert len(tags(moved.store)) == 4
    moved.store.client.rename_experiment(experiment, anchor.EXPERIMENT)
    moved.store = Store()
    assert problems(moved) == ""


def test_a_forged_entry_has_to_fit_the_moves(moved: Still) -> None:
    """A whole chain written anew, with hashes that fit, but moves that do not."""
    forged = move(moved, 3, before=2)
    assert f"entry {forged.sequence} moves production from version 2, but it was at version 5" in problems(moved)


def test_an_alias_moved_through_mlflow(moved: Still) -> None:
    moved.store.client.set_registered_model_alias("still", "production", "1")
    said = "production points at version 1, but the ledger says version 5: somebody moved it through MLflow itself"
    assert problems(moved) == said
    book = log.read_ledger(moved.store, "still")
    assert book.problems("staging") == []
    assert book.problems("production") == [said]
    moved.store.client.delete_registered_model_alias("still", "production")
    assert "production points at no version" in problems(moved)


def test_adopting_it(moved: Still) -> None:
    store = moved.store
    assert log.adopt_alias(store, "still", "production", who="me", reason="") is None  # nothing to adopt
    store.client.set_registered_model_alias("still", "production", "1")
    entry = log.adopt_alias(store, "still", "production", who="me", reason="so be it")
    assert (entry.action, entry.from_version, entry.to_version) == ("adopt", 5, 1)
    assert (entry.artifact, entry.reason) == (moved.teacher.digest, "so be it")
    assert problems(moved) == ""
    assert log.read_ledger(store, "still").version_history("production") == [3, 4, 5, 1]


def test_an_alias_that_the_ledger_does_not_know(moved: Still) -> None:
    moved.store.client.set_registered_model_alias("still", "canary", "1")
    book: Ledger = log.read_ledger(moved.store, "still")
    assert book.problems("production") == []
    assert (
        book.problems("canary")
        == book.problems()
        == ["canary points at version 1, but the ledger does not know it: somebody moved it through MLflow itself"]
    )
    log.adopt_alias(moved.store, "still", "canary", who="me", reason="")
    assert problems(moved) == ""


def test_adopting_what_is_missing(moved: Still) -> None:
    """What was adopted is not told again; what comes after is."""
    store = moved.store
    store.client.delete_registered_model_tag("still", list(tags(store))[1])
    missing = problems(moved)
    assert missing.startswith("entry 2 (")
    assert "\n" not in missing
    entry = log.adopt_alias(store, "still", "production", who="me", reason="lost in a backup")
    assert entry is not None
    assert (entry.sequence, entry.from_version, entry.to_version, len(entry.adopted)) == (5, 5, 5, 1)
    move(moved, 3, 5)
    book = log.read_ledger(store, "still")
    assert (book.problems(), book.remaining_adopted_problems()) == ([], [f"{missing} (adopted in entry 5)"])
    assert log.adopt_alias(store, "still", "production", who="me", reason="") is None
    store.client.delete_registered_model_tag("still", next(iter(tags(store))))
    assert problems(moved).startswith("entry 1 (")
    changed(store, 1, lambda value: value.replace('"who":"me"', '"who":"you"'))
    assert "entry 4 was changed" in problems(moved)


def unfinished(still: Still, **changes: Any) -> LedgerEntry:
    """An entry of a process that was killed before it moved the alias."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=5, to_version=3, artifact=None, verdict=None,
        reason="",
    )  # fmt: skip
    return log.append_entry(still.store, "still", **fields | changes)


def test_settling_what_was_not_carried_out(moved: Still) -> None:
    store = moved.store
    book = log.read_ledger(store, "still")
    assert log.finish_pending_moves(store, "still", who="me") == book
    entry = unfinished(moved)
    assert log.read_ledger(store, "still").unfinished_move("production") == entry
    assert problems(moved) == ""  # between the two steps nothing is wrong
    assert log.finish_pending_moves(store, "still", who="me").aliases["production"] == 3
    assert log.read_ledger(store, "still").unfinished_move("production") is None
    # Killed between the move and its mark: the mark alone is made.
    entry = unfinished(moved, from_version=3, to_version=4)
    store.client.set_registered_model_alias("still", "production", "4")
    assert log.finish_pending_moves(store, "still", who="me").unfinished_move("production") is None
    assert problems(moved) == ""


def test_a_late_move_of_another_machine(moved: Still) -> None:
    """It was held up before it moved the alias, others finished its entry and went on: it undoes nothing."""
    store, client = moved.store, moved.store.client
    late = unfinished(moved)
    log.finish_pending_moves(store, "still", who="other")
    move(moved, 4, 3)
    move(moved, 5, 4)
    log.apply_entry(store, late)
    assert (store.aliases("still")["production"], problems(moved)) == (5, "")
    # And where it dies of it, having moved the alias, the next one puts that right.
    client.set_registered_model_tag("still", APPLIED_TAG_PREFIX + "production", MOVING_MARK_PREFIX + late.hash)
    client.set_registered_model_alias("still", "production", "3")
    assert problems(moved) == ""
    assert log.finish_pending_moves(store, "still", who="me").aliases["production"] == 5


def test_what_was_never_entered_is_cleared(moved: Still) -> None:
    """Killed between the two halves of writing an entry: it is none, and the next one takes its number."""
    store = moved.store
    entry = unfinished(moved)
    half = entry.model_copy(update={"sequence": 6, "previous": entry.hash})
    half = half.model_copy(update={"hash": compute_entry_hash(half)})
    log.finish_pending_moves(store, "still", who="me")
    store.client.set_registered_model_tag("still", entry_tag(6, half.hash), half.model_dump_json())
    book = log.read_ledger(store, "still")
    assert (book.entries[-1], book.problems(), book.stray_tags) == (entry, [], [])
    sixth = move(moved, 5, 3)
    assert sixth.sequence == 6
    assert log.read_ledger(store, "still").pending_tags == []  # the next one has cleared it
    late = half.model_copy(update={"who": "late"})  # and one that comes too late goes when a ledger is settled
    late = late.model_copy(update={"hash": compute_entry_hash(late)})
    store.client.set_registered_model_tag("still", entry_tag(6, late.hash), late.model_dump_json())
    assert log.read_ledger(store, "still").stray_tags == [entry_tag(6, late.hash)]
    assert log.finish_pending_moves(store, "still", who="me").stray_tags == []
    assert (log.read_entries(store, "still")[-1], problems(moved)) == (sixth, "")


@pytest.mark.parametrize(("action", "undone"), [("promote", "rollback"), ("rollback", "adopt")])
def test_settling_over_damaged_files(moved: Still, action: str, undone: str) -> None:
    store = moved.store
    target = 3 if action == "promote" else 4
    entry = unfinished(moved, action=action, to_version=target)
    (store.artifacts.verified_folder(store.get(f"still/{target}")) / "model.onnx").write_text("damaged")
    settled = log.finish_pending_moves(store, "still", who="you").entries[-1]
    assert (settled.action, settled.from_version, settled.to_version, settled.who) == (undone, target, 5, "you")
    assert f"entry {entry.sequence} was never carried out: " in settled.reason
    book = log.read_ledger(store, "still")
    assert (book.aliases["production"], book.version_history("production")[-1], book.problems()) == (5, 5, [])
    assert log.finish_pending_moves(store, "still", who="you") == book


def test_settling_leaves_what_somebody_else_moved(moved: Still) -> None:
    unfinished(moved)
    moved.store.client.set_registered_model_alias("still", "production", "1")
    log.finish_pending_moves(moved.store, "still", who="me")
    assert moved.store.aliases("still")["production"] == 1
    assert "production points at version 1, but the ledger says version 3" in problems(moved)


def test_two_machines_writing_at_once(moved: Still) -> None:
    """No lock reaches over machines: whoever comes second to a number is told so, and has written nothing."""
    book = log.read_ledger(moved.store, "still")
    first = unfinished(moved)  # the other machine's, written after we read
    with pytest.raises(log.ConcurrentMove, match="at the same moment; nothing was moved here"):
        unfinished(moved, based_on=book)
    assert log.read_entries(moved.store, "still")[4:] == [first]
    second = unfinished(moved, from_version=3, to_version=4)
    assert (first.sequence, second.sequence, second.previous) == (5, 6, first.hash)
    assert problems(moved) == ""


def test_reasons_and_names(still: Still) -> None:
    with pytest.raises(BadInput, match="2001 characters, at most 2000"):
        unfinished(still, reason="x" * 2001)
    longest = unfinished(still, from_version=None, reason="\u2620" * 2000)
    with pytest.raises(BadInput, match="characters, MLflow keeps 5000"):
        unfinished(still, overridden_rules=("x" * 3000,), reason="\u2620" * 2000)
    assert log.read_entries(still.store, "still") == [longest]
    with pytest.raises(BadInput, match="did you mean still"):
        log.read_ledger(still.store, "stil")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "", "a b", "a/b", "a@b", "../x", "1st", "x" * 101])
def test_aliases_that_cannot_be_used(alias: str) -> None:
    with pytest.raises(BadInput, match="alias"):
        log.check_alias(alias)


@pytest.mark.parametrize("alias", ["production", "v1-candidate", "a_b-C", "x" * 100])
def test_aliases_that_can(alias: str) -> None:
    log.check_alias(alias)
