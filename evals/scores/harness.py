"""Run lm-eval over a model: one metric per task, with a value and a weight for every document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from limbeck.evals.engines.batches import BATCH_TOKENS
from limbeck.evals.engines.lazy import open_engine
from limbeck.evals.engines.score_cache import ScoreCache
from limbeck.evals.stats.retention import mean_and_stderr
from limbeck.evals.tasks.chance import Chance
from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA, document_table
from limbeck.evals.tasks.loading import show_warnings
from limbeck.evals.tasks.metrics import group_aggregation, outermost_groups
from limbeck.evals.tasks.task_set import FEWSHOT_SEED, TaskSet, hide_progress_bars
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import BadInput, Unreachable
from limbeck.registry.core.terminal import quiet_libraries
from limbeck.registry.records import TaskResult

if TYPE_CHECKING:
    from limbeck.evals.engines.engine import Engine


class Scores(NamedTuple):
    """A model's results on a task set.

    Attributes:
        tasks: results by task and by group. A sub-task names the outermost group that it counts in.
        prompts_digest: over every prompt_hash.
        documents: one row per document, with the columns of DOCUMENT_SCHEMA. A metric is the mean of its documents'
            values by their weights; a group's metric is that of all documents of its sub-tasks.
    """

    tasks: dict[str, TaskResult]
    prompts_digest: str
    documents: pa.Table


def score_model(
    model: ResolvedModel,
    tasks: TaskSet,
    *,
    batch_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Scores:
    """Score one model. Take its earlier answers from the cache, and add the rest to it.

    Args:
        batch_tokens: the most tokens of one forward pass; see `limbeck.evals.engines.lm_eval_model.LimbeckLM`.
        on_progress: called with the number of finished requests and of all requests.
        force: run every request again and replace the cached answers.

    Raises:
        BadInput: the model cannot be loaded, cannot do a task, or returns NaN.
        Unreachable: an endpoint does not answer; its earlier answers stay in the cache.
    """
    quiet_libraries()
    from lm_eval.evaluator import evaluate

    from limbeck.evals.engines.lm_eval_model import ChatSettings, LimbeckLM, RequestNames

    done = 0

    def advance(requests: int) -> None:
        nonlocal done
        done += requests
        on_progress(done, tasks.requests)

    settings = tasks.settings
    engine = open_engine(model, trust_remote_code)
    with ScoreCache(model.digest, overwrite=force) as cache, hide_progress_bars(), show_warnings():
        lm = LimbeckLM(
            engine,
            names=RequestNames(model.label, tasks.numbers.get),
            cache=cache,
            harness=tasks.harness,
            chat=ChatSettings(
                template=_chat_template(engine, settings.apply_chat_template),
                template_args=settings.chat_template_args,
                think_end=settings.think_end,
            ),
            batch_tokens=batch_tokens or BATCH_TOKENS,
            on_requests=advance,
        )
        for task in tasks.tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        try:
            results = evaluate(
                lm,
                {"tasks": tasks.tasks, "groups": tasks.groups},
                samples={name: numbers for name, numbers in tasks.numbers.items() if numbers is not None} or None,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=settings.system_instruction,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.uses_multiturn,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )
        except Unreachable as error:
            raise Unreachable(
                f"{error.message}; {done} of {tasks.requests} requests are answered and stored",
                fix="run the same command again to continue",
            ) from error
    return _scores(tasks, results)


def _chat_template(engine: Engine, requested: bool | str) -> str | None:
    """The name of the chat template to use; None if the tokenizer has only one. Raises BadInput if it is unknown."""
    if not requested:
        return None
    known, label = engine.tokenizer.chat_template, engine.tokenizer.name_or_path
    if not known:
        raise BadInput(f"the tokenizer of {label} has no chat template", fix="leave --apply-chat-template out")
    names = sorted(known) if isinstance(known, dict) else ["default"]
    name = "default" if requested is True else requested
    if name not in names:
        raise BadInput(f"{label} has no chat template {name!r}", fix=f"it has {', '.join(names)}")
    return name if isinstance(known, dict) else None


def _scores(tasks: TaskSet, results: Any) -> Scores:
    """Convert lm-eval's results to `Scores`."""
    chosen, clusters = tasks.metrics, tasks.clusters
    tables = {
        name: document_table(task, chosen[name], results["samples"][name], clusters[name].labels)
        for name, task in tasks.tasks.items()
    }
    members = {
        group: leaves
        for group, leaves in outermost_groups(tasks.groups).items()
        if chosen[leaves[0]].key in results["results"][group]
    }
    for group, names in members.items():
        how = group_aggregation(tasks.groups[group], chosen[names[0]].name)
        if how and not how.weight_by_size:
            # The group's value is the mean of its tasks' means. Within a task all documents weigh the same.
            documents = sum(tables[name].num_rows for name in names)
            for name in names:
                weight = documents / len(names) / tables[name].num_rows
                column = DOCUMENT_SCHEMA.get_field_index("weight")
                weights = pa.array([weight] * tables[name].num_rows)
                tables[name] = tables[name].set_column(column, DOCUMENT_SCHEMA.field(column), weights)

    def result(name: str, leaves: Sequence[str], group: str | None) -> TaskResult:
        """The result of a task, or of a group with its tasks as `leaves`."""

        metric, task = chosen[leaves[0]], tasks.tasks[leaves[0]]
        table = pa.concat_tables([tables[leaf] for leaf in leaves])
        columns = (table[column].to_numpy() for column in ("value", "weight", "cluster"))
        hashes = [tasks.task_hashes[leaf] for leaf in leaves]
        prompts = [json_digest(tables[leaf]["prompt_hash"].to_pylist()) for leaf in leaves]
        chance = _mean_chance([tasks.chances[leaf] for leaf in leaves], [_total(tables[leaf]) for leaf in leaves])
        return TaskResult(
            metric=metric.name,
            filter=metric.filter,
            value=float(results["results"][name][metric.key]),
            stderr=mean_and_stderr(*columns)[1],
            higher_is_better=bool(task.higher_is_better().get(metric.name, True)),
            documents=table.num_rows,
            of_documents=sum(len(tasks.tasks[leaf].eval_docs) for leaf in leaves),
            limit_seed=tasks.settings.limit_seed if tasks.is_random_sample(leaves) else None,
            clusters=len(set(table["cluster"].to_pylist())),
            repeats=sum(clusters[leaf].repeats for leaf in leaves),
            chance=chance.value,
            chance_source=chance.source,
            task_hash=hashes[0] if leaves == [name] else json_digest(hashes),
            prompt_hash=prompts[0] if leaves == [name] else json_digest(prompts),
            group=group,
        )

    group_of = {leaf: group for group, leaves in members.items() for leaf in leaves}
    scored = {group: result(group, leaves, None) for group, leaves in members.items()}
    scored |= {name: result(name, [name], group_of.get(name)) for name in tasks.tasks}
    prompts = {name: scored[name].prompt_hash for name in tasks.tasks}
    in_order = {name: scored[name] for name in (*tasks.names, *scored) if name in scored}
    return Scores(in_order, json_digest(prompts), pa.concat_tables(tables.values()))


def _mean_chance(chances: Sequence[Chance], weights: Sequence[float]) -> Chance:
    """The chance level of several tasks together; without a value if one of them has none."""
    known = [chance.value for chance in chances if chance.value is not None]
    sources = dict.fromkeys(chance.source for chance in chances if chance.source)
    value = float(np.average(known, weights=weights)) if len(known) == len(chances) else None
    return Chance(value, ", ".join(sources) or None)


def _total(table: pa.Table) -> float:
    return float(table["weight"].to_numpy().sum())
