"""Writes the model card of a version from its records: Hugging Face's format, Markdown below a YAML header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.registry.catalog import snippets
from limbeck.registry.catalog.lineage import LineageNode, lineage_path, run_parameters
from limbeck.registry.catalog.model_card_header import model_card_yaml
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.core.markdown import code_block, escape_inline, markdown_table
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.provenance.licences import LineageLicence, licence_names, lineage_licences, terms_of_licence
from limbeck.registry.records import FIGURES, Cost, Parity, Scorecard, TaskResult, TrainingCost, Verdict, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

MAX_ROWS = 100  # of a table
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class _CardContent:
    """The records that a model card shows."""

    version: Version
    scorecard: Scorecard | None  # the newest
    missing_scorecard_text: str  # the text without a scorecard
    older_scorecards: int  # number of scorecards before it
    parity: Parity | None
    verdict: Verdict | None  # the newest
    recipe: Mapping[str, str]  # parameters of the run that made it
    training_cost: TrainingCost | None
    lineage: list[LineageNode]  # from the first ancestor down to it
    lineage_licences: list[LineageLicence]


def model_card(store: Store, version: Version) -> str:
    """The model card of a version.

    Text from users (names, licences, parameters, messages) is escaped, on one line, and cut if it is long.
    """
    content = _gather_content(store, version)
    sections = {
        "What it is": _about(content),
        "How to use": _use(content),
        "Data": _data(content),
        "Method": _method(content),
        "Scores": _scores(content),
        "Cost": _cost(content),
        "Against PyTorch": _parity(content),
        "Licences": _licences(content),
        "Limits": _limits(content),
        "Lineage": _lineage(content),
    }
    body = "".join(f"\n## {title}\n\n{text}" for title, text in sections.items() if text)
    header = model_card_yaml(version, content.scorecard, content.recipe)
    return f"---\n{header}---\n\n# {escape_inline(version.ref)}\n{body}"


def _gather_content(store: Store, version: Version) -> _CardContent:
    verdicts = store.findings.verdicts(version)
    missing_scorecard_text = "It has not been scored."
    try:
        scorecards = store.findings.scorecards(version)
    except LimbeckError as error:  # a model can be deployed without its scores
        scorecards, missing_scorecard_text = [], f"Its scorecards cannot be read: {escape_inline(error.message)}."
    try:
        parameters, training_cost = run_parameters(store, version), store.runs.training_cost(version)
    except NotFound:  # its run was deleted
        parameters, training_cost = {}, None
    return _CardContent(
        version,
        scorecards[-1] if scorecards else None,
        missing_scorecard_text,
        max(0, len(scorecards) - 1),
        store.findings.parity(version),
        verdicts[-1] if verdicts else None,
        parameters,
        training_cost,
        lineage_path(store, version),
        lineage_licences(store, version),
    )


def _about(content: _CardContent) -> str:
    version = content.version
    kinds = {"teacher": "A language model that others learn from", "student": "A language model"}
    summary = kinds.get(version.kind, f"An ONNX model in {escape_inline(version.precision)}, for onnxruntime")
    if version.engine == "endpoint":
        summary = "A language model behind an endpoint"
    if version.control:
        summary += f", a control for distillation, trained without the teacher ({escape_inline(version.control)})"
    elif version.parent:
        summary += f", {'exported' if version.kind == 'onnx' else 'distilled'} from {escape_inline(version.parent)}"
    rows = {
        "version": version.ref,
        "digest": version.digest,
        "kind": version.kind,
        "precision": version.precision,
        "parameters": f"{version.params:,}" if version.params is not None else None,
        "recipe": version.recipe,
        "registered": f"{version.created:%Y-%m-%d %H:%M} UTC" + (f" by {version.author}" if version.author else ""),
        "aliases": " ".join(version.aliases) or None,
        "newest gate decision": f"{content.verdict.outcome}, {content.verdict.created:%Y-%m-%d}"
        if content.verdict
        else None,
    }
    return f"{summary}.\n\n{_key_value_table(rows)}"


def _use(content: _CardContent) -> str:
    version = content.version
    parts = [code_block(snippets.command_snippets(version), "sh")]
    for library, lines in snippets.python_snippets(version).items():
        parts.append(f"In Python, with {library}:\n\n{code_block(lines, 'python')}")
    return "\n".join(parts)


def _data(content: _CardContent) -> str:
    rows = {n.removeprefix("data."): v for n, v in content.recipe.items() if n.startswith("data.") and _has_value(v)}
    rows |= {n: v for n, v in content.recipe.items() if n.startswith("generate.") and _has_value(v)}
    rows |= {"digest": content.version.data_digest} if content.version.data_digest else {}
    return _key_value_table(rows) or "The text that it was trained on is not recorded.\n"


def _method(content: _CardContent) -> str:
    version, cost = content.version, content.training_cost
    rows: dict[str, Any] = {"recipe digest": version.recipe_digest, "code": version.code_version}
    if cost:
        rows["tokens seen"] = f"{cost.tokens:,}"
        rows["training"] = f"{cost.training_seconds:,.0f} s on {cost.machine}, {cost.device}"
        if cost.teacher_seconds:
            students = f"for {cost.students_sharing_teacher} students"
            rows["teacher's passes"] = f"{cost.teacher_seconds:,.0f} s, {students}"
        rows["model behind an API"] = cost.api_model
    shown_elsewhere = ("data.", "generate.", "code_version", "teacher")
    rows |= {n: v for n, v in content.recipe.items() if not n.startswith(shown_elsewhere) and _has_value(v)}
    return _key_value_table(rows) or "How it was made is not recorded.\n"


def _scores(content: _CardContent) -> str:
    scored = content.scorecard
    if scored is None:
        return f"{content.missing_scorecard_text}\n"
    relative = scored.relative
    rows = []
    for task, result in scored.tasks.items():
        retention = relative.task_retention.get(task) if relative else None
        overlap = scored.contamination.tasks.get(task) if scored.contamination else None
        rows.append(
            (
                task,
                result.metric + (", more is better" if result.higher_is_better else ", less is better"),
                f"{result.value:.4f}{_interval(result)}",
                f"{result.documents:,}",
                f"{overlap.contaminated:,}" if overlap else None,
                f"{retention.value:.3f} [{retention.low:.3f}, {retention.high:.3f}]" if retention else None,
            )
        )
    columns = ["task", "metric", "value, 95% interval", "documents", "in training text", "retention, 95% interval"]
    text = f"Scored with {escape_inline(scored.harness)}, {scored.created:%Y-%m-%d}"
    if relative:
        teacher = escape_inline(relative.teacher)
        text += f"; retention is the share of the quality above chance of {teacher}, paired by document"
    text += f".\n\n{_table(columns, rows)}\n"
    overall = relative.retention if relative else None
    if overall:
        text += f"Retention over all tasks: {overall.value:.3f} [{overall.low:.3f}, {overall.high:.3f}]. "
    tasks, prompts = escape_inline(scored.tasks_digest[:12]), escape_inline(scored.prompts_digest[:12])
    text += f"Digest of the tasks {tasks}, of the prompts {prompts}"
    return text + (f"; there are {content.older_scorecards} older scorecards.\n" if content.older_scorecards else ".\n")


def _cost(content: _CardContent) -> str:
    cost = content.scorecard.cost if content.scorecard else None
    relative = content.scorecard.relative if content.scorecard else None
    if cost is None:
        return "Its cost has not been measured.\n"
    ratio = relative.cost_ratio if relative else None
    speedup = relative.speedup if relative else None
    rows = {
        **{figure.title: _format_figure(cost, name) for name, figure in FIGURES.items()},
        "cost relative to its teacher": f"{ratio:.3g}" if ratio is not None else None,
        "speed relative to its teacher": f"{speedup:.3g} times" if speedup is not None else None,
    }
    machine = f"{escape_inline(cost.machine)}, {cost.threads} threads, {escape_inline(cost.device)}"
    price = f" at {cost.usd_per_hour:g} USD an hour" + (f" ({escape_inline(cost.price)})" if cost.price else "")
    request = f"a request is {cost.prompt_tokens} tokens in and {cost.new_tokens} out"
    return f"On {machine}; {request};{price}.\n\n{_key_value_table(rows)}"


def _format_figure(cost: Cost, name: str) -> str | None:
    """A cost figure with its interval, in the unit of its title; None if it was not measured."""
    figure, interval = FIGURES[name], cost.intervals.get(name)
    value = figure.format_value(cost.figures()[name])
    if value is None or interval is None:
        return value
    return f"{value} [{figure.format_value(interval.low)}, {figure.format_value(interval.high)}]"


def _parity(content: _CardContent) -> str:
    parity = content.parity
    if parity is None:
        is_variant = content.version.kind == "onnx"
        return "It has not been compared with the model that it was exported from.\n" if is_variant else ""
    rows = {
        "passed": "yes" if parity.passed else "no",
        "quality": parity.describe_limits(),
        "tokens": f"{parity.tokens:,}",
        "largest difference in log-probability": f"{parity.max_logprob_diff:.2g}",
        "mean KL, nats per token": f"{parity.mean_kl:.2g}",
        "same most likely token": f"{parity.top1_agreement:.1%}",
        "bits per byte": f"{parity.bits_per_byte:.4f}, of PyTorch {parity.bits_per_byte_reference:.4f}",
        "greedy text": "identical" if parity.greedy_identical else "differs",
        "long texts": parity.describe_lengths(),
        "the checkpoint, as loaded": parity.describe_reading(),
    }
    note = "Parity cannot find a misread checkpoint, since both sides share the misreading: the last row says what was"
    return f"On held-out text. {note} compared with its files.\n\n{_key_value_table(rows)}"


def _licences(content: _CardContent) -> str:
    version = content.version
    rows: list[tuple[str | None, ...]] = [("this model", version.ref, version.licence or "not stated", None)]
    if version.code_licence:
        rows.append(("code that made it", version.code_version, version.code_licence, None))
    answers = {True: "yes", False: "no", None: "unknown"}
    rows += [
        (each.role, each.origin, each.licence or "not stated", answers[each.allows_distillation])
        for each in content.lineage_licences
    ]
    text = _table(["", "of", "licence", "a model may learn from it"], rows)
    licence_of_terms = {terms_of_licence(licence): licence for row in rows for licence in licence_names(row[2])}
    for terms, licence in licence_of_terms.items():
        if terms:
            text += f"\n{escape_inline(licence)}, in Limbeck's summary: {escape_inline(terms.summary)}.\n"
    return text


def _limits(content: _CardContent) -> str:
    return "".join(f"- {line}\n" for line in _limit_lines(content))


def _limit_lines(content: _CardContent) -> Iterator[str]:
    scored = content.scorecard
    yield "A model of its size completes text like its training text. Check what it writes."
    if scored is None:
        yield f"Its quality is unknown. {content.missing_scorecard_text}"
    else:
        fewest = min((result.documents for result in scored.tasks.values()), default=0)
        yield f"Its scores cover {len(scored.tasks)} tasks with at least {fewest:,} documents each, and nothing else."
        if scored.relative is None:
            yield "It has not been compared with a teacher."
        if scored.contamination is None:
            yield "Whether its training text contains documents of these tasks is unknown."
        else:
            contaminated = sum(overlap.contaminated for overlap in scored.contamination.tasks.values())
            if contaminated:
                yield f"{contaminated:,} documents that it was scored on occur in its training text."
    if scored is not None and scored.cost is not None:
        yield "Its cost was measured on one machine, and differs on others."
    if content.verdict is not None and content.verdict.outcome != "pass":
        failing = ", ".join(escape_inline(rule.rule) for rule in content.verdict.rules if rule.outcome != "pass")
        yield f"Its newest gate decision is {content.verdict.outcome}: {failing}."
    if content.version.licence is None:
        yield "Its licence is not stated."


def _lineage(content: _CardContent) -> str:
    rows = [
        (node.ref, node.version.kind, node.version.precision, node.version.digest)
        if node.version
        else (node.ref, "deleted", None, None)
        for node in content.lineage
    ]
    return "From the first ancestor down.\n\n" + _table(["version", "kind", "precision", "digest"], rows)


def _interval(result: TaskResult) -> str:
    if result.stderr is None:
        return ""
    half = NORMAL_95 * result.stderr
    return f" [{result.value - half:.4f}, {result.value + half:.4f}]"


def _key_value_table(rows: Mapping[str, Any]) -> str:
    return _table(["", ""], [pair for pair in rows.items() if pair[1] is not None])


def _table(columns: list[str], rows: list[Any]) -> str:
    left = len(rows) - MAX_ROWS
    return markdown_table(columns, rows[:MAX_ROWS]) + (f"\nand {left:,} more\n" if left > 0 else "")


def _has_value(value: str) -> bool:
    return value not in ("", "None")
