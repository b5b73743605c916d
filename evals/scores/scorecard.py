"""Make scorecards: score models, measure their cost, compare each with a teacher, and reuse what is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet

from limbeck.evals.cost.measure import (
    PROTOCOL,
    describe_machine,
    group_by_memory,
    measure_costs,
    paired_cost_ratio,
    reprice,
)
from limbeck.evals.cost.prices import Prices
from limbeck.evals.scores.harness import score_model
from limbeck.evals.stats.retention import check_numbers, compare_with_teacher
from limbeck.evals.tasks.contamination import measure_contamination
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.digest import verify_files, write_manifest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status, progress_bar
from limbeck.registry.records import Contamination, Cost, Estimate, Relative, Scorecard, top_level_tasks

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store


def evaluate(
    models: Sequence[ResolvedModel],
    tasks: TaskSet,
    store: Store | None = None,
    *,
    against: ResolvedModel | None = None,
    cost: bool = True,
    prices: Prices | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> list[Scorecard]:
    """Score models, the teacher first, then measure their cost. Store each scorecard as soon as it is complete.

    A model with stored scores on exactly these tasks is not run again. Its cost is measured again only if it was not
    measured on this machine, in one run with the teacher's: a cost ratio needs costs that were measured in turn.
    Naming a teacher later, or other prices, only adds to stored scorecards. Scorecards of registered versions go to
    MLflow; those of folders stay below `home()`.

    Args:
        models: the models to score.
        store: holds the registered models.
        against: the teacher; its scorecard comes first in the result.
        cost: whether to measure costs that are unknown.
        prices: of machines; None for those that Limbeck ships.
        force: score and measure everything again.

    Raises:
        BadInput: a model cannot be loaded, a score is NaN, or documents do not pair with the teacher's.
    """
    prices = prices or Prices.load()
    every = list({model.label: model for model in [*([against] if against else []), *models]}.values())
    kept = {model.label: [] if force else list(stored_scorecards(model, store)) for model in every}
    scored: dict[str, StoredScorecard] = {}
    cards: dict[str, StoredScorecard] = {}
    printed: set[str] = set()
    timed = against if against and not against.endpoint else None
    if cost:
        for model in every:
            if model.endpoint:
                print_status(f"  {model.label}: the cost of an endpoint cannot be measured from here")

    def finish(model: ResolvedModel, own: Cost | None, teachers: Cost | None) -> None:
        a, b = (reprice(each, *prices.machine_price(each.machine)) if each else None for each in (own, teachers))
        found = scored[model.label]
        update = {"model": model.label, "created": datetime.now(UTC), "cost": a}
        if overlap[model.label]:
            update["contamination"] = overlap[model.label]
        card = found.card.model_copy(update=update)
        if against:
            relative, lines = _relative(found._replace(card=card), scored[against.label], against, b)
            card = card.model_copy(update={"relative": relative})
            for line in lines - printed:
                print_status(f"  {line}")
            printed.update(lines)

        cards[model.label] = _store_scorecard(found._replace(card=card), model, store, [*kept[model.label], found])
        print_status(f"  {_summary_line(cards[model.label].card)}")

    overlap = _overlaps(every, tasks)
    unknown = []
    for model in every:
        scored[model.label] = _newest_matching(kept[model.label], tasks) or _score(
            model, tasks, force, trust_remote_code
        )
        costs = _known_costs(model, kept[model.label], timed, kept[timed.label] if timed else [])
        if cost and not costs.is_complete and not model.endpoint:
            unknown.append(model)
        else:
            finish(model, costs.own, costs.teacher)
    for group in group_by_memory(unknown, timed) if unknown else ():
        with _progress_bar(f"measuring the cost of {len(group)} models", "rounds") as on_round:
            found = measure_costs(group, trust_remote_code=trust_remote_code, on_round=on_round)
        measured = {model.label: each for model, each in zip(group, found, strict=True)}
        for model in unknown:
            if model.label in measured and model.label not in cards:
                finish(model, measured[model.label], measured[timed.label] if timed else None)
    return [cards[model.label].card for model in every]


def _overlaps(models: Sequence[ResolvedModel], tasks: TaskSet) -> dict[str, Contamination | None]:
    """By model label, how many task documents occur in its training text; None if the text is not on this machine.

    Prints one line for each training text.
    """
    texts: dict[str, list[str]] = {}
    for model in models:
        if model.version and model.version.data_digest:
            texts.setdefault(model.version.data_digest, []).append(model.label)
    found: dict[str, Contamination | None] = {model.label: None for model in models}
    for digest, labels in texts.items():
        with _progress_bar("reading the training text", "documents") as on_progress:
            overlap = measure_contamination(tasks, digest, on_progress)
        found |= dict.fromkeys(labels, overlap)
        print_status(f"  training text of {', '.join(labels)}: {_describe_contamination(overlap)}")
    return found


def _describe_contamination(overlap: Contamination | None) -> str:
    if overlap is None:
        return "not on this machine, so its overlap with the tasks is unknown"
    words = [f"{each.contaminated} of {each.documents} of {task}" for task, each in overlap.tasks.items()]
    return f"documents that occur in it: {', '.join(words)}"


class StoredScorecard(NamedTuple):
    """A scorecard and its parquet of documents."""

    card: Scorecard
    documents: Path
    registered: bool = False


def stored_scorecards(model: ResolvedModel, store: Store | None) -> Iterator[StoredScorecard]:
    """The stored scorecards of exactly these files: below `home()`, then in MLflow; each oldest first."""
    folders = (path for path in _local_folder(model).glob("*") if (path / "scorecard.json").exists())
    found = []
    for folder in folders:
        try:
            verify_files(folder)
            card = Scorecard.model_validate_json((folder / "scorecard.json").read_text())
        except (DamagedArtifact, ValueError):  # damaged: the model is scored again
            continue
        found.append(StoredScorecard(card, folder / "documents.parquet"))
    yield from sorted(found, key=lambda each: each.card.created)
    if store and model.version:
        for card in store.findings.scorecards(model.version):
            if card.artifact == model.digest:
                yield StoredScorecard(card, store.findings.documents(model.version, card), registered=True)


def _newest_matching(kept: Sequence[StoredScorecard], tasks: TaskSet) -> StoredScorecard | None:
    """The newest scorecard on these tasks by this version of lm-eval."""
    fitting = [each for each in kept if (each.card.tasks_digest, each.card.harness) == (tasks.digest, tasks.harness)]
    return max(fitting, key=lambda each: each.card.created, default=None)


def _store_scorecard(
    own: StoredScorecard, model: ResolvedModel, store: Store | None, kept: Sequence[StoredScorecard]
) -> StoredScorecard:
    """Store a scorecard and return it; if an equal one is stored already, return that one."""
    wanted = bool(store and model.version)
    for each in reversed(kept):
        if each.registered == wanted and each.card == own.card.model_copy(update={"created": each.card.created}):
            return each
    if store and model.version:
        store.findings.add_scorecard(model.version, own.card, own.documents)
        return own
    return _store_locally(own.card, parquet.read_table(own.documents), model)


def _store_locally(card: Scorecard, documents: pa.Table, model: ResolvedModel) -> StoredScorecard:
    folder = _local_folder(model) / card.digest()[:16]
    with atomic_write(folder) as part:
        part.mkdir()
        (part / "scorecard.json").write_text(card.model_dump_json(indent=1))
        parquet.write_table(documents, part / "documents.parquet")
        write_manifest(part)
    return StoredScorecard(card, folder / "documents.parquet")


def _local_folder(model: ResolvedModel) -> Path:
    return home() / "scorecards-local" / model.digest


def _score(model: ResolvedModel, tasks: TaskSet, force: bool, trust_remote_code: bool) -> StoredScorecard:
    """Run the model over the tasks, and store the scores below `home()` first of all."""
    began = time.monotonic()
    with _progress_bar(f"{model.label}: scoring") as on_progress:
        scores = score_model(model, tasks, on_progress=on_progress, force=force, trust_remote_code=trust_remote_code)
    check_numbers(scores.documents, model.label)
    card = Scorecard(
        artifact=model.digest,
        model=model.label,
        tasks=scores.tasks,
        tasks_digest=tasks.digest,
        prompts_digest=scores.prompts_digest,
        harness=tasks.harness,
        created=datetime.now(UTC),
        seconds=time.monotonic() - began,
    )
    return _store_locally(card, scores.documents, model)


class _Costs(NamedTuple):
    """The stored cost of a model, and its teacher's cost in the same run."""

    own: Cost | None
    teacher: Cost | None
    is_complete: bool  # measured on this machine, and the teacher's with it


def _known_costs(
    model: ResolvedModel,
    stored: Sequence[StoredScorecard],
    teacher: ResolvedModel | None,
    teacher_cards: Sequence[StoredScorecard],
) -> _Costs:
    """The best stored cost of a model: measured in one run with the teacher's, then on this machine, then newest."""
    here = describe_machine(model)
    beside = {each.card.cost.run: each.card.cost for each in teacher_cards if each.card.cost}
    for each in stored:
        relative = each.card.relative
        if teacher and relative and relative.teacher_cost and relative.teacher_digest == teacher.digest:
            beside[relative.teacher_cost.run] = relative.teacher_cost
    beside.pop(None, None)

    def worth(card: Scorecard) -> tuple[bool, bool, datetime]:
        assert card.cost
        fits = card.cost.protocol == PROTOCOL and (teacher is None or card.cost.run in beside)
        return fits, card.cost.machine == here, card.created

    best = max((each.card for each in stored if each.card.cost), key=worth, default=None)
    if best is None or best.cost is None:
        return _Costs(None, None, False)
    return _Costs(best.cost, beside.get(best.cost.run), worth(best)[:2] == (True, True))


@contextmanager
def _progress_bar(label: str, unit: str = "requests") -> Iterator[Callable[[int, int | None], None]]:
    with progress_bar() as bar:
        row = bar.add_task(label, total=None, rate="")
        began = time.monotonic()

        def on_progress(done: int, total: int | None) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(row, completed=done, total=total, rate=f"{rate:,.1f} {unit}/s")

        yield on_progress


def _relative(
    own: StoredScorecard, teacher_scores: StoredScorecard, teacher: ResolvedModel, teacher_cost: Cost | None
) -> tuple[Relative, set[str]]:
    """Compare a scorecard with the teacher's scores and its cost of the same run. Returns warnings to print, too."""
    found = compare_with_teacher(
        parquet.read_table(own.documents), parquet.read_table(teacher_scores.documents), teacher_scores.card.tasks
    )
    warnings = {f"{task} has no retention: {why}" for task, why in found.left_out.items()}
    cost, cost_ratio, speedup = own.card.cost, None, None
    if cost and teacher_cost:
        cost_ratio = paired_cost_ratio(cost, teacher_cost)
        speedup = Estimate(
            value=1 / cost_ratio.value,
            low=1 / cost_ratio.high,
            high=1 / cost_ratio.low,
            confidence=cost_ratio.confidence,
        )
    elif cost:
        warnings.add(f"{own.card.model} has no cost ratio: its cost was not measured in one run with the teacher's")
    relative = Relative(
        teacher=teacher.label,
        teacher_digest=teacher.digest,
        retention=found.retention,
        task_retention=found.task_retention,
        difference=found.difference,
        cost_ratio=cost_ratio.value if cost_ratio else None,
        speedup=speedup.value if speedup else None,
        cost_ratio_interval=cost_ratio,
        speedup_interval=speedup,
        teacher_cost=teacher_cost,
    )
    return relative, warnings


def _summary_line(card: Scorecard) -> str:
    """A scorecard in one line."""
    words = [f"{task} {card.tasks[task].metric} {card.tasks[task].value:.4g}" for task in top_level_tasks(card.tasks)]
    if card.relative and (kept := card.relative.retention):
        words.append(f"retention {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]")
    if card.cost:
        words.append(f"{card.cost.decode_tokens_per_s:,.0f} tokens/s")
    return f"{card.model}: {', '.join(words)}"
