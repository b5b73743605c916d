"""Scorecards: models scored, their cost measured, each held against a teacher; what is known is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet

from evals.cost import check_price, comparable, machine, measure, priced
from evals.harness import score
from evals.statistics import check_numbers, compare, top_level
from evals.task_set import TaskSet
from registry.digest import verify, write_manifest
from registry.errors import DamagedArtifact
from registry.home import home, written_whole
from registry.records import Cost, Relative, Scorecard
from registry.resolve import Model
from registry.terminal import progress, say

if TYPE_CHECKING:
    from registry.store import Store


def evaluate(
    models: Sequence[Model],
    tasks: TaskSet,
    store: Store | None = None,
    *,
    usd_per_hour: float,
    against: Model | None = None,
    cost: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
) -> list[Scorecard]:
    """Score models, the teacher first, and keep each scorecard as soon as it is whole.

    A model whose scores on these very tasks are kept is not run again, nor is its cost measured again on this
    machine: a teacher named later, or another price, only adds to what is there. Scorecards of registered
    versions go to MLflow; those of folders stay below `home()`.

    Args:
        models: what to score.
        store: where the registered ones are.
        usd_per_hour: the price of this machine.
        against: the teacher; its own scorecard comes first in the result.
        cost: measure it where it is not known.
        force: score and measure everything anew.

    Raises:
        BadInput: a model that cannot be loaded, scores that are no numbers, documents that do not pair with
            the teacher's, a price that is not above zero.
    """
    check_price(usd_per_hour)
    cards: dict[str, _Kept] = {}
    told: set[str] = set()
    for model in [*([against] if against else []), *models]:
        if model.label in cards:
            continue
        kept = [] if force else list(_kept(model, store))
        scored = _find(kept, tasks) or _score(model, tasks, force, trust_remote_code)
        price = _cost(model, [each.card for each in kept], cost, trust_remote_code)
        card = scored.card.model_copy(
            update={
                "model": model.label,
                "created": datetime.now(UTC),
                "cost": priced(price, usd_per_hour) if price else None,
            }
        )
        own = _Kept(card, scored.documents)
        if against:
            relative, left_out = _relative(own, cards.get(against.label, own))
            own = own._replace(card=card.model_copy(update={"relative": relative}))
            for line in left_out - told:
                say(f"  {line}")
            told |= left_out
        cards[model.label] = _keep(own, model, store, [*kept, scored])
        say(f"  {_told(cards[model.label].card)}")
    return [each.card for each in cards.values()]


class _Kept(NamedTuple):
    """A scorecard and its parquet of documents."""

    card: Scorecard
    documents: Path
    registered: bool = False


def _kept(model: Model, store: Store | None) -> Iterator[_Kept]:
    """What is kept of these very files: below `home()`, then with the version in MLflow; each oldest first."""
    folders = (path for path in _local(model).glob("*") if (path / "scorecard.json").exists())
    found = []
    for folder in folders:
        try:
            verify(folder)
            card = Scorecard.model_validate_json((folder / "scorecard.json").read_text())
        except (DamagedArtifact, ValueError):  # scored again
            continue
        found.append(_Kept(card, folder / "documents.parquet"))
    yield from sorted(found, key=lambda each: each.card.created)
    if store and model.version:
        for card in store.scorecards(model.version):
            if card.artifact == model.digest:
                yield _Kept(card, store.documents(model.version, card), registered=True)


def _find(kept: Sequence[_Kept], tasks: TaskSet) -> _Kept | None:
    """The newest that is of these tasks and this harness."""
    fitting = [each for each in kept if (each.card.tasks_digest, each.card.harness) == (tasks.digest, tasks.harness)]
    return max(fitting, key=lambda each: each.card.created, default=None)


def _keep(own: _Kept, model: Model, store: Store | None, kept: Sequence[_Kept]) -> _Kept:
    """Keep a scorecard, unless one that says the same is kept already: that one is given back."""
    wanted = bool(store and model.version)
    for each in reversed(kept):
        if each.registered == wanted and each.card == own.card.model_copy(update={"created": each.card.created}):
            return each
    if store and model.version:
        store.add_scorecard(model.version, own.card, own.documents)
        return own
    return _keep_local(own.card, parquet.read_table(own.documents), model)


def _keep_local(card: Scorecard, documents: pa.Table, model: Model) -> _Kept:
    folder = _local(model) / card.digest()[:16]
    with written_whole(folder) as part:
        part.mkdir()
        (part / "scorecard.json").write_text(card.model_dump_json(indent=1))
        parquet.write_table(documents, part / "documents.parquet")
        write_manifest(part)
    return _Kept(card, folder / "documents.parquet")


def _local(model: Model) -> Path:
    return home() / "scorecards-local" / model.digest


def _score(model: Model, tasks: TaskSet, force: bool, trust_remote_code: bool) -> _Kept:
    """Run the model over the tasks; what comes out is kept below `home()` before anything else is done."""
    with _bar(f"{model.label}: scoring") as on_progress:
        scores = score(model, tasks, on_progress=on_progress, force=force, trust_remote_code=trust_remote_code)
    check_numbers(scores.documents, model.label)
    card = Scorecard(
        artifact=model.digest,
        model=model.label,
        tasks=scores.tasks,
        tasks_digest=tasks.digest,
        prompts_digest=scores.prompts_digest,
        harness=tasks.harness,
        created=datetime.now(UTC),
    )
    return _keep_local(card, scores.documents, model)


def _cost(model: Model, kept: Sequence[Scorecard], wanted: bool, trust_remote_code: bool) -> Cost | None:
    """The cost as measured on this machine before, else measured now where it is wanted."""
    known = [card.cost for card in sorted(kept, key=lambda card: card.created) if card.cost]
    here = [cost for cost in known if cost.machine == machine(model)]
    if here or not wanted:
        return next(reversed(here or known), None)
    with _bar(f"{model.label}: measuring its cost"):
        return measure(model, usd_per_hour=1.0, trust_remote_code=trust_remote_code)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with progress() as bar:
        row = bar.add_task(label, total=None, rate="")
        began = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(row, completed=done, total=total, rate=f"{rate:,.0f} requests/s")

        yield on_progress


def _relative(own: _Kept, teacher: _Kept) -> tuple[Relative, set[str]]:
    """A scorecard relative to the teacher's, and what has to be said about it."""
    found = compare(parquet.read_table(own.documents), parquet.read_table(teacher.documents), teacher.card.tasks)
    said = {f"{task} has no retention: {why}" for task, why in found.left_out.items()}
    a, b = own.card.cost, teacher.card.cost
    if a and b and not comparable(a, b):
        said.add(f"{own.card.model} has no cost ratio: its cost was measured elsewhere or otherwise than the teacher's")
        a = None
    relative = Relative(
        teacher=teacher.card.model,
        teacher_digest=teacher.card.artifact,
        retention=found.retention,
        task_retention=found.task_retention,
        difference=found.difference,
        cost_ratio=a.usd_per_million_tokens / b.usd_per_million_tokens if a and b else None,
        speedup=b.p50_ms / a.p50_ms if a and b else None,
    )
    return relative, said


def _told(card: Scorecard) -> str:
    """A scorecard in one line."""
    words = [f"{task} {card.tasks[task].metric} {card.tasks[task].value:.4g}" for task in top_level(card.tasks)]
    if card.relative and (kept := card.relative.retention):
        words.append(f"retention {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]")
    if card.cost:
        words.append(f"{card.cost.decode_tokens_per_s:,.0f} tokens/s")
    return f"{card.model}: {', '.join(words)}"
