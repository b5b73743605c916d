"""The model card of a version, written from its records: Hugging Face's format, Markdown below a YAML head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.registry.catalog import snippets
from limbeck.registry.catalog.lineage import Node, path, recipe
from limbeck.registry.catalog.model_card_header import head
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.core.markdown import block, inline, table
from limbeck.registry.mlflow.client import NotThere
from limbeck.registry.provenance.licences import Term, chain, names, terms
from limbeck.registry.records import Making, Parity, Scorecard, TaskResult, Verdict, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

MOST_ROWS = 100  # of a table
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class _Known:
    """All that a card tells."""

    version: Version
    card: Scorecard | None  # the newest
    no_card: str  # what to say where it has none
    older: int  # scorecards before it
    parity: Parity | None
    verdict: Verdict | None  # the newest
    recipe: Mapping[str, str]  # parameters of the run that made it
    making: Making | None
    lineage: list[Node]  # from the first ancestor down to it
    terms: list[Term]  # the licences of what it came from


def card(store: Store, version: Version) -> str:
    """The model card of a version.

    What comes from outside (names, licences, parameters, messages) is written as text, on one line; of what is too
    long the beginning is.
    """
    known = _gather(store, version)
    sections = {
        "What it is": _about(known),
        "How to use": _use(known),
        "Data": _data(known),
        "Method": _method(known),
        "Scores": _scores(known),
        "Cost": _cost(known),
        "Against PyTorch": _parity(known),
        "Licences": _licences(known),
        "Limits": _limits(known),
        "Lineage": _lineage(known),
    }
    body = "".join(f"\n## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{head(version, known.card, known.recipe)}---\n\n# {inline(version.ref)}\n{body}"


def _gather(store: Store, version: Version) -> _Known:
    verdicts = store.verdicts(version)
    no_card = None
    try:
        cards = store.scorecards(version)
    except LimbeckError as error:  # a model is deployed without its scores, too
        cards, no_card = [], f"Its scorecards cannot be read: {inline(error.message)}."
    try:
        parameters, making = recipe(store, version), store.making(version)
    except NotThere:  # its run was deleted
        parameters, making = {}, None
    return _Known(
        version,
        cards[-1] if cards else None,
        no_card or "It has not been scored.",
        max(0, len(cards) - 1),
        store.parity(version),
        verdicts[-1] if verdicts else None,
        parameters,
        making,
        path(store, version),
        chain(store, version),
    )


def _about(known: _Known) -> str:
    version = known.version
    kinds = {"teacher": "A language model that others learn from", "student": "A language model"}
    what = kinds.get(version.kind, f"An ONNX model in {inline(version.precision)}, for onnxruntime")
    if version.engine == "endpoint":
        what = "A language model behind an endpoint"
    if version.control:
        what += f", made without a teacher to hold distillation against ({inline(version.control)})"
    elif version.parent:
        what += f", {'exported' if version.kind == 'onnx' else 'distilled'} from {inline(version.parent)}"
    rows = {
        "version": version.ref,
        "digest": version.digest,
        "kind": version.kind,
        "precision": version.precision,
        "parameters": f"{version.params:,}" if version.params is not None else None,
        "recipe": version.recipe,
        "registered": f"{version.created:%Y-%m-%d %H:%M} UTC" + (f" by {version.author}" if version.author else ""),
        "aliases": " ".join(version.aliases) or None,
        "newest verdict": f"{known.verdict.outcome}, {known.verdict.created:%Y-%m-%d}" if known.verdict else None,
    }
    return f"{what}.\n\n{_pairs(rows)}"


def _use(known: _Known) -> str:
    version = known.version
    parts = [block(snippets.commands(version), "sh")]
    for library, lines in snippets.python(version).items():
        parts.append(f"In Python, with {library}:\n\n{block(lines, 'python')}")
    return "\n".join(parts)


def _data(known: _Known) -> str:
    told = {n.removeprefix("data."): v for n, v in known.recipe.items() if n.startswith("data.") and _says(v)}
    told |= {n: v for n, v in known.recipe.items() if n.startswith("generate.") and _says(v)}
    told |= {"digest": known.version.data_digest} if known.version.data_digest else {}
    return _pairs(told) or "The text that it was trained on is not recorded.\n"


def _method(known: _Known) -> str:
    version, making = known.version, known.making
    told: dict[str, Any] = {"recipe digest": version.recipe_digest, "code": version.code_version}
    if making:
        told |= {
            "tokens seen": f"{making.tokens:,}",
            "training": f"{making.training_seconds:,.0f} s on {making.machine}, {making.device}",
            "teacher's passes": f"{making.teacher_seconds:,.0f} s, for {making.teacher_students} students"
            if making.teacher_seconds
            else None,
            "model behind an API": making.api_model,
        }
    other = ("data.", "generate.", "code_version", "teacher")
    told |= {n: v for n, v in known.recipe.items() if not n.startswith(other) and _says(v)}
    return _pairs(told) or "How it was made is not recorded.\n"


def _scores(known: _Known) -> str:
    scored = known.card
    if scored is None:
        return f"{known.no_card}\n"
    relative = scored.relative
    rows = []
    for task, result in scored.tasks.items():
        kept = relative.task_retention.get(task) if relative else None
        overlap = scored.contamination.tasks.get(task) if scored.contamination else None
        rows.append(
            (
                task,
                result.metric + (", more is better" if result.higher_is_better else ", less is better"),
                f"{result.value:.4f}{_interval(result)}",
                f"{result.documents:,}",
                f"{overlap.contaminated:,}" if overlap else None,
                f"{kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]" if kept else None,
            )
        )
    columns = ["task", "metric", "value, 95% interval", "documents", "in training text", "retention, 95% interval"]
    lines = [f"By {inline(scored.harness)}, {scored.created:%Y-%m-%d}"]
    if relative:
        lines.append(
            f"; retention is the share of what {inline(relative.teacher)} has above chance, paired by document"
        )
    text = "".join(lines) + f".\n\n{_table(columns, rows)}\n"
    if relative and (whole := relative.retention):
        text += f"Over all tasks it keeps {whole.value:.3f} [{whole.low:.3f}, {whole.high:.3f}]. "
    text += (
        f"Digest of the tasks {inline(scored.tasks_digest[:12])}, of the prompts {inline(scored.prompts_digest[:12])}"
    )
    return text + (f"; {known.older} older scorecards are kept.\n" if known.older else ".\n")


def _cost(known: _Known) -> str:
    cost = known.card.cost if known.card else None
    relative = known.card.relative if known.card else None
    if cost is None:
        return "What it costs has not been measured.\n"
    usd, p50 = cost.usd_interval, cost.p50_interval
    ratio, speedup = (relative.cost_ratio, relative.speedup) if relative else (None, None)
    rows = {
        "USD per million tokens": f"{cost.usd_per_million_tokens:.3g}"
        + (f" [{usd.low:.3g}, {usd.high:.3g}]" if usd else ""),
        "a request, median": f"{cost.p50_ms:.1f} ms" + (f" [{p50.low:.1f}, {p50.high:.1f}]" if p50 else ""),
        "a request, 95th percentile": f"{cost.p95_ms:.1f} ms",
        "prefill": f"{cost.prefill_tokens_per_s:,.0f} tokens/s",
        "decode": f"{cost.decode_tokens_per_s:,.0f} tokens/s",
        "files": f"{cost.disk_bytes / 1e6:,.1f} MB",
        "peak memory": f"{cost.peak_rss_bytes / 1e6:,.0f} MB",
        "cost beside its teacher's": f"{ratio:.3g} of it" if ratio is not None else None,
        "speed beside its teacher's": f"{speedup:.3g} times" if speedup is not None else None,
    }
    how = f"{inline(cost.machine)}, {cost.threads} threads, {inline(cost.device)}"
    price = f" at {cost.usd_per_hour:g} USD an hour" + (f" ({inline(cost.price)})" if cost.price else "")
    return f"On {how}; a request is {cost.prompt_tokens} tokens in and {cost.new_tokens} out;{price}.\n\n{_pairs(rows)}"


def _parity(known: _Known) -> str:
    parity = known.parity
    if parity is None:
        return (
            "It has not been held against the model that it was exported from.\n"
            if known.version.kind == "onnx"
            else ""
        )
    rows = {
        "passed": "yes" if parity.passed else "no",
        "tokens": f"{parity.tokens:,}",
        "largest difference in log-probability": f"{parity.max_logprob_diff:.2g}",
        "mean KL, nats per token": f"{parity.mean_kl:.2g}",
        "same likeliest token": f"{parity.top1_agreement:.1%}",
        "bits per byte": f"{parity.bits_per_byte:.4f}, of PyTorch {parity.bits_per_byte_reference:.4f}",
        "greedy text": "identical" if parity.greedy_identical else "differs",
    }
    return f"On held-out text.\n\n{_pairs(rows)}"


def _licences(known: _Known) -> str:
    version = known.version
    rows: list[tuple[str | None, ...]] = [("this model", version.ref, version.licence or "not stated", None)]
    if version.code_licence:
        rows.append(("code that made it", version.code_version, version.code_licence, None))
    may = {True: "yes", False: "no", None: "not known"}
    rows += [(term.role, term.of, term.licence or "not stated", may[term.allows]) for term in known.terms]
    text = _table(["", "of", "licence", "a model may learn from it"], rows)
    said = {terms(licence): licence for row in rows for licence in names(row[2])}
    for known_terms, licence in said.items():
        if known_terms:
            text += f"\n{inline(licence)}, as Limbeck reads it: {inline(known_terms.said)}.\n"
    return text


def _limits(known: _Known) -> str:
    return "".join(f"- {line}\n" for line in _limit_lines(known))


def _limit_lines(known: _Known) -> Iterator[str]:
    scored = known.card
    yield "A model of its size completes text like its training text; what it writes has to be checked."
    if scored is None:
        yield f"Nothing is known of its quality. {known.no_card}"
    else:
        fewest = min((result.documents for result in scored.tasks.values()), default=0)
        yield f"Its scores tell of {len(scored.tasks)} tasks of {fewest:,} documents or more, and of nothing else."
        if scored.relative is None:
            yield "It has not been held against a teacher."
        if scored.contamination is None:
            yield "Whether its training text holds documents of these tasks is not known."
        elif held := sum(overlap.contaminated for overlap in scored.contamination.tasks.values()):
            yield f"{held:,} documents that it was scored on occur in its training text."
    if scored is not None and scored.cost is not None:
        yield "Its cost is that of one machine; on another it is another."
    if known.verdict is not None and known.verdict.outcome != "pass":
        broken = ", ".join(inline(rule.rule) for rule in known.verdict.rules if rule.outcome != "pass")
        yield f"Its newest verdict is {known.verdict.outcome}: {broken}."
    if known.version.licence is None:
        yield "Its licence is not stated."


def _lineage(known: _Known) -> str:
    rows = [
        (node.ref, node.version.kind, node.version.precision, node.version.digest)
        if node.version
        else (node.ref, "not there any more", None, None)
        for node in known.lineage
    ]
    return "From the first ancestor down.\n\n" + _table(["version", "kind", "precision", "digest"], rows)


def _interval(result: TaskResult) -> str:
    if result.stderr is None:
        return ""
    half = NORMAL_95 * result.stderr
    return f" [{result.value - half:.4f}, {result.value + half:.4f}]"


def _pairs(rows: Mapping[str, Any]) -> str:
    return _table(["", ""], [pair for pair in rows.items() if pair[1] is not None])


def _table(columns: list[str], rows: list[Any]) -> str:
    left = len(rows) - MOST_ROWS
    return table(columns, rows[:MOST_ROWS]) + (f"\nand {left:,} more\n" if left > 0 else "")


def _says(value: str) -> bool:
    return value not in ("", "None")
