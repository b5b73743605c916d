"""Make scorecards: score models, measure their cost, compare each with a teacher, and reuse what is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

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
from limbeck.evals.cost.speculation import measure_speculation, task_prompts
from limbeck.evals.scores.harness import score_model
from limbeck.evals.scores.stored_scorecards import (
    StoredScorecard,
    newest_matching,
    store_locally,
    store_scorecard,
    stored_scorecards,
)
from limbeck.evals.stats.retention import check_numbers, compare_with_teacher
from limbeck.evals.tasks.contamination import measure_contamination
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status, progress_bar
from limbeck.registry.records import Contamination, Cost, Estimate, Relative, Scorecard, top_level_tasks

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How `evaluate` works.

    Attributes:
        cost: whether to measure costs that are unknown.
        prices: of machines; None for those that Limbeck ships.
        draft: measure speculative decoding with this ONNX artifact, too.
        force: score and measure everything again.
        trust_remote_code: run Python code that comes with a model.
    """

    cost: bool = True
    prices: Prices | None = None
    draft: ResolvedModel | None = None
    force: bool = False
    trust_remote_code: bool = False


def evaluate(
    models: Sequence[ResolvedModel],
    tasks: TaskSet,
    store: Store | None = None,
    *,
    against: ResolvedModel | None = None,
    options: EvalOptions | None = None,
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
        options: None for the defaults.

    Raises:
        BadInput: a model cannot be loaded, a score is NaN, or documents do not pair with the teacher's.
    """
    return _Evaluation(models, tasks, store, against, options or EvalOptions()).run()


class _Evaluation:
    """One call of `evaluate`: what is stored and what is done so far, by model label."""

    def __init__(
        self,
        models: Sequence[ResolvedModel],
        tasks: TaskSet,
        store: Store | None,
        teacher: ResolvedModel | None,
        options: EvalOptions,
    ) -> None:
        self.models = list({model.label: model for model in [*([teacher] if teacher else []), *models]}.values())
        self.tasks = tasks
        self.store = store
        self.teacher = teacher
        self.timed_teacher = teacher if teacher and not teacher.endpoint else None
        self.options = options
        self.prices = options.prices or Prices.load()
        self.stored = {
            model.label: [] if options.force else list(stored_scorecards(model, store)) for model in self.models
        }
        self.overlaps: dict[str, Contamination | None] = {}
        self.scored: dict[str, StoredScorecard] = {}
        self.complete: dict[str, Scorecard] = {}
        self.printed_warnings: set[str] = set()

    def run(self) -> list[Scorecard]:
        """The complete scorecard of each model, the teacher's first."""
        if self.options.cost:
            for model in self.models:
                if model.endpoint:
                    print_status(f"  {model.label}: the cost of an endpoint cannot be measured from here")
        self.overlaps = _overlaps(self.models, self.tasks)
        unmeasured = [model for model in self.models if not self._score(model)]
        self._measure(unmeasured)
        return [self.complete[model.label] for model in self.models]

    def _score(self, model: ResolvedModel) -> bool:
        """Score a model. Complete its scorecard, and return True, unless its cost has to be measured."""
        stored = self.stored[model.label]
        self.scored[model.label] = newest_matching(stored, self.tasks) or _run_tasks(model, self.tasks, self.options)
        teacher = self.timed_teacher
        costs = _known_costs(model, stored, teacher, self.stored[teacher.label] if teacher else [])
        if self.options.cost and not costs.is_complete and not model.endpoint:
            return False
        self._complete(model, costs.own, costs.teacher)
        return True

    def _measure(self, models: Sequence[ResolvedModel]) -> None:
        """Measure the cost of models, each in one run with the teacher's, and complete their scorecards."""
        teacher = self.timed_teacher
        for group in group_by_memory(models, teacher) if models else ():
            with _progress_bar(f"measuring the cost of {len(group)} models", "rounds") as on_round:
                costs = measure_costs(group, trust_remote_code=self.options.trust_remote_code, on_round=on_round)
            measured = {model.label: cost for model, cost in zip(group, costs, strict=True)}
            for model in models:
                if model.label in measured and model.label not in self.complete:
                    self._complete(model, measured[model.label], measured[teacher.label] if teacher else None)

    def _complete(self, model: ResolvedModel, cost: Cost | None, teacher_cost: Cost | None) -> None:
        """Add to a model's scores its cost, its overlap and its comparison with the teacher; store the scorecard."""
        scored = self.scored[model.label]
        cost = self._with_speculation(model, cost, scored)
        update = {"model": model.label, "created": datetime.now(UTC), "cost": self._at_current_price(cost)}
        if self.overlaps[model.label]:
            update["contamination"] = self.overlaps[model.label]
        own = scored._replace(card=scored.card.model_copy(update=update))
        if self.teacher:
            relative, warnings = _relative(
                own, self.scored[self.teacher.label], self.teacher, self._at_current_price(teacher_cost)
            )
            own = own._replace(card=own.card.model_copy(update={"relative": relative}))
            for warning in warnings - self.printed_warnings:
                print_status(f"  {warning}")
            self.printed_warnings |= warnings
        stored = store_scorecard(own, model, self.store, [*self.stored[model.label], scored])
        self.complete[model.label] = stored.card
        print_status(f"  {_summary_line(stored.card)}")

    def _with_speculation(self, model: ResolvedModel, cost: Cost | None, scored: StoredScorecard) -> Cost | None:
        """The cost, with the figures of speculative decoding if a draft model was named and can serve this one."""
        draft = self.options.draft
        if not cost or not draft or model.engine != "onnxruntime" or model.digest == draft.digest:
            return cost
        if cost.draft == draft.digest and not self.options.force:
            return cost
        prompts = task_prompts(parquet.read_table(scored.documents, columns=["prompt_end"]))
        if not prompts:
            return cost
        try:
            with _progress_bar(f"{model.label}: with proposals of {draft.label}", "prompts") as on_prompt:
                return measure_speculation(model, draft, prompts, cost, on_prompt)
        except BadInput as error:
            print_status(f"  {model.label} was not timed with proposals of {draft.label}: {error}")
            return cost

    def _at_current_price(self, cost: Cost | None) -> Cost | None:
        return reprice(cost, *self.prices.machine_price(cost.machine)) if cost else None


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


def _run_tasks(model: ResolvedModel, tasks: TaskSet, options: EvalOptions) -> StoredScorecard:
    """Run the model over the tasks, and store the scores below `home()` first of all."""
    began = time.monotonic()
    with _progress_bar(f"{model.label}: scoring") as on_progress:
        scores = score_model(
            model,
            tasks,
            on_progress=on_progress,
            force=options.force,
            trust_remote_code=options.trust_remote_code,
        )
    check_numbers(scores.documents, model.label)
    for name, result in scores.tasks.items():
        if result.repeats:
            print_status(
                f"  {name}: {result.repeats} of {result.documents} documents repeat others, so the error is that of "
                f"{result.clusters} independent ones"
            )
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
    return store_locally(card, scores.documents, model)


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
    if sources := _chance_sources(teacher_scores.card):
        warnings.add(f"retention counts from {sources}")
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


def _chance_sources(card: Scorecard) -> str:
    """What the retention of each top-level task counts from."""
    results = {task: card.tasks[task] for task in top_level_tasks(card.tasks)}
    return ", ".join(f"{r.chance:.3g} on {task} ({r.chance_source})" for task, r in results.items() if r.chance_source)


def _summary_line(card: Scorecard) -> str:
    """A scorecard in one line."""
    words = [f"{task} {card.tasks[task].metric} {card.tasks[task].value:.4g}" for task in top_level_tasks(card.tasks)]
    retention = card.relative.retention if card.relative else None
    if retention:
        words.append(f"retention {retention.value:.3f} [{retention.low:.3f}, {retention.high:.3f}]")
    if card.cost:
        words.append(f"{card.cost.decode_tokens_per_s:,.0f} tokens/s")
        if card.cost.speculative_speedup:
            words.append(f"{card.cost.speculative_speedup:.2f} times as fast with a draft model")
    return f"{card.model}: {', '.join(words)}"
