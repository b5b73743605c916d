"""The ledger of alias moves: changes made to it, or to aliases without it, are found."""

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
    """Append an entry and make its move."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=before, to_version=to, artifact=None,
        verdict=None, reason="",
    )  # fmt: skip
    entry = log.append_entry(still.store, "still", **fields | changes)
    log.apply_entry(still.store, entry)
    return entry


@pytest.fixture
def moved(still: Still) -> Still:
    """The model `still`: `production` moved to 3, 4 and 5; `staging` to 3."""
    move(still, 3)
    move(still, 4, 3)
    move(still, 3, alias="staging")
    move(still, 5, 4)
    return still


def entry_tags(store: Store) -> dict[str, str]:
    """The tags of the entries, first to last."""
    all_tags = store.client.get_registered_model("still").tags
    return {key: all_tags[key] for key in sorted(all_tags) if key.startswith(ENTRY_TAG_PREFIX)}


def problems(still: Still) -> str:
    return "\n".join(log.read_ledger(still.store, "still").problems())


def test_entries_are_chained(moved: Still) -> None:
    ledger = log.read_ledger(moved.store, "still")
    assert [(e.sequence, e.alias, e.from_version, e.to_version) for e in ledger.entries] == [
        (1, "production", None, 3),
        (2, "production", 3, 4),
        (3, "staging", None, 3),
        (4, "production", 4, 5),
    ]
    assert [entry.previous for entry in ledger.entries] == ["", *(entry.hash for entry in ledger.entries[:-1])]
    assert len({entry.hash for entry in ledger.entries}) == 4
    assert ledger.aliases == {"production": 5, "staging": 3}
    assert ledger.version_history("production") == [3, 4, 5]
    assert ledger.problems() == []
    assert log.read_entries(moved.store, "still") == ledger.entries


def change_entry(store: Store, number: int, edit: Callable[[str], str]) -> None:
    key, value = list(entry_tags(store).items())[number]
    store.client.set_registered_model_tag("still", key, edit(value))


@pytest.mark.parametrize("number", [0, 3])
def test_a_changed_entry(moved: Still, number: int) -> None:
    change_entry(moved.store, number, lambda value: value.replace('"who":"me"', '"who":"you"'))
    assert f"entry {number + 1} was changed: its hash is" in problems(moved)


@pytest.mark.parametrize("numbers", [(0,), (1,), (2, 3), (3,), (0, 1, 2, 3)])
def test_deleted_entries(moved: Still, numbers: tuple[int, ...]) -> None:
    """Also the last ones or all of them, with their marks: the anchor still knows them."""
    keys = list(entry_tags(moved.store))
    for number in numbers:
        moved.store.client.delete_registered_model_tag("still", keys[number])
    for alias in ("production", "staging"):
        moved.store.client.delete_registered_model_tag("still", APPLIED_TAG_PREFIX + alias)
    assert {f"entry {n + 1} ({keys[n].rpartition('.')[2][:12]}) is missing" for n in numbers} <= {
        problem for problem in problems(moved).split("\n") if "is missing" in problem
    }


def test_reordered_entries(moved: Still) -> None:
    keys = list(entry_tags(moved.store))
    values = entry_tags(moved.store)
    moved.store.client.set_registered_model_tag("still", keys[0], values[keys[1]])
    moved.store.client.set_registered_model_tag("still", keys[1], values[keys[0]])
    assert problems(moved).count("is in the place of another") == 2


def test_a_duplicated_and_an_unreadable_entry(moved: Still) -> None:
    key, value = list(entry_tags(moved.store).items())[1]
    for double in (key + "x", key.replace("000002", "000005"), key.replace("000002", "000009"), ENTRY_TAG_PREFIX + "x"):
        moved.store.client.set_registered_model_tag("still", double, value)
        place = double.removeprefix(ENTRY_TAG_PREFIX)
        assert problems(moved) == f"the entry {place} was never written to the ledger: the anchor does not know it"
        moved.store.client.delete_registered_model_tag("still", double)
    moved.store.client.set_registered_model_tag("still", key, "no entry")
    assert "cannot be read" in problems(moved)


def test_a_rewritten_chain(moved: Still) -> None:
    """Every hash is right and every entry follows the one before, but the anchor knows other hashes."""
    store, previous = moved.store, ""
    for key, value in entry_tags(store).items():
        entry = LedgerEntry.model_validate_json(value).model_copy(update={"who": "you", "previous": previous})
        entry = entry.model_copy(update={"hash": compute_entry_hash(entry)})
        store.client.delete_registered_model_tag("still", key)
        store.client.set_registered_model_tag("still", entry_tag(entry.sequence, entry.hash), entry.model_dump_json())
        previous = entry.hash
    for alias in ("production", "staging"):
        store.client.delete_registered_model_tag("still", APPLIED_TAG_PREFIX + alias)
    assert problems(moved).count("is missing") == problems(moved).count("was never written to the ledger") == 4


def test_an_anchor_that_was_deleted_or_replaced(moved: Still) -> None:
    """MLflow still returns the parameters of a deleted run, but accepts no further ones."""
    ledger = log.read_ledger(moved.store, "still")
    assert ledger.anchor is not None
    moved.store.client.delete_run(ledger.anchor.run_id)
    assert problems(moved) == f"the MLflow run {ledger.anchor.run_id}, which anchors the ledger, was deleted"
    with pytest.raises(BadInput, match="limbeck doctor --repair"):
        move(moved, 3, 5)
    moved.store.client.restore_run(ledger.anchor.run_id)
    assert problems(moved) == ""
    moved.store.client.set_experiment_tag(
        moved.store.client.get_experiment_by_name(anchor.EXPERIMENT).experiment_id,
        anchor.ROOT_RUN_TAG,
        ledger.anchor.run_id,
    )
    moved.store = Store()
    assert f"entry 1 is anchored in the run {ledger.anchor.run_id}, the ledger in none" in problems(moved)


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
    assert len(entry_tags(moved.store)) == 4
    moved.store.client.rename_experiment(experiment, anchor.EXPERIMENT)
    moved.store = Store()
    assert problems(moved) == ""


def test_a_forged_entry_must_continue_the_moves(moved: Still) -> None:
    """Its hash is right, but it starts where the alias was not."""
    forged = move(moved, 3, before=2)
    assert f"entry {forged.sequence} moves production from version 2, but it was at version 5" in problems(moved)


def test_an_alias_moved_through_mlflow(moved: Still) -> None:
    moved.store.client.set_registered_model_alias("still", "production", "1")
    problem = "production points at version 1, but the ledger says version 5: somebody moved it through MLflow itself"
    assert problems(moved) == problem
    ledger = log.read_ledger(moved.store, "still")
    assert ledger.problems("staging") == []
    assert ledger.problems("production") == [problem]
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
    ledger: Ledger = log.read_ledger(moved.store, "still")
    assert ledger.problems("production") == []
    assert (
        ledger.problems("canary")
        == ledger.problems()
        == ["canary points at version 1, but the ledger does not know it: somebody moved it through MLflow itself"]
    )
    log.adopt_alias(moved.store, "still", "canary", who="me", reason="")
    assert problems(moved) == ""


def test_adopting_what_is_missing(moved: Still) -> None:
    """An adopted problem is not reported again; later ones are."""
    store = moved.store
    store.client.delete_registered_model_tag("still", list(entry_tags(store))[1])
    missing = problems(moved)
    assert missing.startswith("entry 2 (")
    assert "\n" not in missing
    entry = log.adopt_alias(store, "still", "production", who="me", reason="lost in a backup")
    assert entry is not None
    assert (entry.sequence, entry.from_version, entry.to_version, len(entry.adopted)) == (5, 5, 5, 1)
    move(moved, 3, 5)
    ledger = log.read_ledger(store, "still")
    assert (ledger.problems(), ledger.remaining_adopted_problems()) == ([], [f"{missing} (adopted in entry 5)"])
    assert log.adopt_alias(store, "still", "production", who="me", reason="") is None
    store.client.delete_registered_model_tag("still", next(iter(entry_tags(store))))
    assert problems(moved).startswith("entry 1 (")
    change_entry(store, 1, lambda value: value.replace('"who":"me"', '"who":"you"'))
    assert "entry 4 was changed" in problems(moved)


def append_only(still: Still, **changes: Any) -> LedgerEntry:
    """Append an entry as a process that is killed before it moves the alias."""
    fields = dict(
        who="me", alias="production", action="promote", from_version=5, to_version=3, artifact=None, verdict=None,
        reason="",
    )  # fmt: skip
    return log.append_entry(still.store, "still", **fields | changes)


def test_pending_moves_are_finished(moved: Still) -> None:
    store = moved.store
    ledger = log.read_ledger(store, "still")
    assert log.finish_pending_moves(store, "still", who="me") == ledger
    entry = append_only(moved)
    assert log.read_ledger(store, "still").unfinished_move("production") == entry
    assert problems(moved) == ""  # a pending move is not a problem
    assert log.finish_pending_moves(store, "still", who="me").aliases["production"] == 3
    assert log.read_ledger(store, "still").unfinished_move("production") is None
    # Killed between the move and its mark: only the mark is written.
    entry = append_only(moved, from_version=3, to_version=4)
    store.client.set_registered_model_alias("still", "production", "4")
    assert log.finish_pending_moves(store, "still", who="me").unfinished_move("production") is None
    assert problems(moved) == ""


def test_a_late_move_of_another_machine(moved: Still) -> None:
    """It paused before it moved the alias; others finished its entry and moved on. Its move undoes nothing."""
    store, client = moved.store, moved.store.client
    late = append_only(moved)
    log.finish_pending_moves(store, "still", who="other")
    move(moved, 4, 3)
    move(moved, 5, 4)
    log.apply_entry(store, late)
    assert (store.aliases("still")["production"], problems(moved)) == (5, "")
    # If it is killed right after moving the alias, the next command corrects that.
    client.set_registered_model_tag("still", APPLIED_TAG_PREFIX + "production", MOVING_MARK_PREFIX + late.hash)
    client.set_registered_model_alias("still", "production", "3")
    assert problems(moved) == ""
    assert log.finish_pending_moves(store, "still", who="me").aliases["production"] == 5


def test_tags_of_entries_that_never_counted_are_deleted(moved: Still) -> None:
    """Killed between writing the tag and the anchor: the entry does not count, and the next one gets its number."""
    store = moved.store
    entry = append_only(moved)
    half = entry.model_copy(update={"sequence": 6, "previous": entry.hash})
    half = half.model_copy(update={"hash": compute_entry_hash(half)})
    log.finish_pending_moves(store, "still", who="me")
    store.client.set_registered_model_tag("still", entry_tag(6, half.hash), half.model_dump_json())
    ledger = log.read_ledger(store, "still")
    assert (ledger.entries[-1], ledger.problems(), ledger.stray_tags) == (entry, [], [])
    sixth = move(moved, 5, 3)
    assert sixth.sequence == 6
    assert log.read_ledger(store, "still").pending_tags == []  # the next entry deleted it
    late = half.model_copy(update={"who": "late"})  # finish_pending_moves deletes one that comes too late
    late = late.model_copy(update={"hash": compute_entry_hash(late)})
    store.client.set_registered_model_tag("still", entry_tag(6, late.hash), late.model_dump_json())
    assert log.read_ledger(store, "still").stray_tags == [entry_tag(6, late.hash)]
    assert log.finish_pending_moves(store, "still", who="me").stray_tags == []
    assert (log.read_entries(store, "still")[-1], problems(moved)) == (sixth, "")


@pytest.mark.parametrize(("action", "undone"), [("promote", "rollback"), ("rollback", "adopt")])
def test_a_pending_move_to_damaged_files_is_reverted(moved: Still, action: str, undone: str) -> None:
    store = moved.store
    target = 3 if action == "promote" else 4
    entry = append_only(moved, action=action, to_version=target)
    (store.artifacts.verified_folder(store.get(f"still/{target}")) / "model.onnx").write_text("damaged")
    last = log.finish_pending_moves(store, "still", who="you").entries[-1]
    assert (last.action, last.from_version, last.to_version, last.who) == (undone, target, 5, "you")
    assert f"entry {entry.sequence} was never carried out: " in last.reason
    ledger = log.read_ledger(store, "still")
    assert (ledger.aliases["production"], ledger.version_history("production")[-1], ledger.problems()) == (5, 5, [])
    assert log.finish_pending_moves(store, "still", who="you") == ledger


def test_an_external_move_is_not_overwritten_by_a_pending_one(moved: Still) -> None:
    append_only(moved)
    moved.store.client.set_registered_model_alias("still", "production", "1")
    log.finish_pending_moves(moved.store, "still", who="me")
    assert moved.store.aliases("still")["production"] == 1
    assert "production points at version 1, but the ledger says version 3" in problems(moved)


def test_two_machines_writing_at_once(moved: Still) -> None:
    """No lock spans machines: the second to claim a number gets an error and has written nothing."""
    ledger = log.read_ledger(moved.store, "still")
    first = append_only(moved)  # the other machine's, written after we read
    with pytest.raises(log.ConcurrentMove, match="at the same moment; nothing was moved here"):
        append_only(moved, based_on=ledger)
    assert log.read_entries(moved.store, "still")[4:] == [first]
    second = append_only(moved, from_version=3, to_version=4)
    assert (first.sequence, second.sequence, second.previous) == (5, 6, first.hash)
    assert problems(moved) == ""


def test_long_reasons_and_unknown_models(still: Still) -> None:
    with pytest.raises(BadInput, match="2001 characters, at most 2000"):
        append_only(still, reason="x" * 2001)
    longest = append_only(still, from_version=None, reason="\u2620" * 2000)
    with pytest.raises(BadInput, match="characters, MLflow keeps 5000"):
        append_only(still, overridden_rules=("x" * 3000,), reason="\u2620" * 2000)
    assert log.read_entries(still.store, "still") == [longest]
    with pytest.raises(BadInput, match="did you mean still"):
        log.read_ledger(still.store, "stil")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "", "a b", "a/b", "a@b", "../x", "1st", "x" * 101])
def test_invalid_aliases(alias: str) -> None:
    with pytest.raises(BadInput, match="alias"):
        log.check_alias(alias)


@pytest.mark.parametrize("alias", ["production", "v1-candidate", "a_b-C", "x" * 100])
def test_valid_aliases(alias: str) -> None:
    log.check_alias(alias)
