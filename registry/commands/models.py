"""`limbeck models list`, `show` and `lineage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import (
    format_option,
    indent_lines,
    print_json,
    print_status,
    print_table,
    write_report,
)

if TYPE_CHECKING:
    from limbeck.registry.catalog.lineage import LineageNode
    from limbeck.registry.catalog.search import SearchHit
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.records import Scorecard, Version


@click.command("list")
@click.argument("name", required=False)
@click.option("--kind", help="teacher, student or onnx.")
@click.option("--recipe", help="The recipe's label.")
@click.option("--precision", help="fp32, int8 or int4.")
@click.option("--parent", help="NAME/VERSION it was made from.")
@click.option("--teacher", help="NAME/VERSION it was distilled from.")
@click.option("--licence", help="In any case of letters.")
@click.option("--author", help="Who registered it.")
@click.option("--alias", help="An alias that points at it.")
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="A tag of MLflow.")
@click.option("--metric", "metrics", metavar="COMPARISON", multiple=True, help="Such as 'retention >= 0.9'.")
@click.option("--since", metavar="DATE", help="Registered then or later.")
@click.option("--until", metavar="DATE", help="Registered before.")
@click.option("--filter", "query", default="", help="MLflow's language, as in \"tags.`limbeck.precision` = 'int8'\".")
@click.option("--sort", metavar="KEY", help="A column or metric; -KEY turns the order.")
@click.option("--limit", type=click.IntRange(min=1), help="At most N versions.", metavar="N")
@format_option
def list_(
    name: str | None,
    alias: str | None,
    tags: tuple[str, ...],
    metrics: tuple[str, ...],
    since: str | None,
    until: str | None,
    query: str,
    sort: str | None,
    limit: int | None,
    output_format: str,
    **fields: str | None,
) -> None:
    """The versions of NAME, or of all models; those of which everything holds that is asked."""
    from limbeck.registry.catalog.search import Query, build_conditions, parse_date, search_versions

    store = _store()
    try:
        asked = build_conditions(fields, tags, metrics, query)
    except BadInput as error:
        raise BadInput(f"--filter {query!r}: {error.message}", fix=error.fix) if query else error from None
    earliest, latest = (parse_date(text) if text else None for text in (since, until))
    hits = search_versions(store, name, Query(asked, earliest, latest, alias, sort, limit))
    narrowed = asked or since or until or alias
    if name and not hits and not narrowed:
        raise store.not_found_error(name)
    if output_format == "json":
        print_json([_plain(hit) for hit in hits])
        return
    shown = list(dict.fromkeys(metric for hit in hits for metric in hit.metrics))
    columns = ["version", "kind", "recipe", "precision", "parameters", "made from", "aliases", "created", "digest"]
    print_table("versions", columns + shown, [_cells(hit, shown) for hit in hits])


def _plain(hit: SearchHit) -> dict[str, Any]:
    if hit.version is None:
        name, _, number = hit.ref.rpartition("/")
        return {"name": name, "version": int(number), "unreadable": hit.unreadable}
    return hit.version.model_dump(mode="json") | ({"metrics": hit.metrics} if hit.metrics else {})


def _cells(hit: SearchHit, metrics: list[str]) -> tuple[Any, ...]:
    values = tuple(f"{hit.metrics[metric]:.4g}" if metric in hit.metrics else None for metric in metrics)
    if hit.version is None:
        return (hit.ref, f"unreadable: {hit.unreadable}", *[None] * 7, *values)
    return (*_row(hit.version), *values)


def _row(version: Version) -> tuple[Any, ...]:
    from limbeck.registry.catalog.lineage import made_from_ref

    return (
        version.ref,
        version.kind,
        version.recipe,
        version.precision,
        f"{version.params:,}" if version.params is not None else None,
        made_from_ref(version),
        " ".join(version.aliases),
        f"{version.created:%Y-%m-%d %H:%M}",
        version.digest[:12],
    )


@click.command()
@click.argument("ref")
@format_option
def show(ref: str, output_format: str) -> None:
    """All that is known of the version REF: NAME/VERSION or NAME@ALIAS."""
    from limbeck.registry.catalog.lineage import lineage_path
    from limbeck.registry.catalog.snippets import command_snippets, python_snippets

    store = _store()
    version = store.get(ref)
    cards = store.findings.scorecards(version)
    parity = store.findings.parity(version)
    verdicts = store.findings.verdicts(version)
    files = _files(store, version)
    if output_format == "json":
        about: dict[str, Any] = {"scorecards": cards, "parity": parity, "verdicts": verdicts, "files": files}
        about |= {"lineage": [node.ref for node in lineage_path(store, version)]}
        about |= {"use": command_snippets(version), "python": python_snippets(version)}
        about |= _requests_and_sbom(store, version)
        print_json(version.model_dump(mode="json") | about)
        return
    fields = version.model_dump(exclude={"name", "version", "aliases"}, exclude_none=True)
    fields["created"] = f"{version.created:%Y-%m-%d %H:%M:%S}"
    fields["aliases"] = " ".join(version.aliases) or None
    if version.engine == "endpoint":
        from limbeck.registry.catalog.model_ref import load_registered_version

        fields["endpoint"] = load_registered_version(version, store).endpoint.label  # type: ignore[union-attr]
    print_table(version.ref, ["field", "value"], fields.items())
    if files:
        print_table("files", ["file", "bytes"], [(file, f"{size:,}") for file, size in files.items()])
    if cards:
        _print_scorecard(cards[-1])
        if len(cards) > 1:
            print_status(f"  and {len(cards) - 1} older scorecards; --format json has them all")
    if parity:
        figures = parity.model_dump(exclude={"reference", "precision"}, exclude_none=True)
        print_table("against PyTorch, on held-out text", ["field", "value"], _format_figures(figures))
    if verdicts:
        rules = [(rule.rule, rule.outcome, rule.message) for rule in verdicts[-1].rules]
        print_table(f"newest verdict: {verdicts[-1].outcome}", ["rule", "outcome", "numbers"], rules)
        if len(verdicts) > 1:
            print_status(f"  and {len(verdicts) - 1} older verdicts; --format json has them all")
    if asked := _requests_and_sbom(store, version):
        print_table("asked and answered", ["what", "is"], _request_rows(asked))
    print_table("lineage", ["version", "kind", "digest"], map(_step, lineage_path(store, version)))
    print_table("use it", ["command"], [(line,) for line in command_snippets(version)])
    for library, lines in python_snippets(version).items():
        print(f"\nin Python, with {library}:\n" + "\n".join(indent_lines(lines)))


def _requests_and_sbom(store: Store, version: Version) -> dict[str, Any]:
    """The requests for aliases with their answers, and the digest of the bill of materials; what there is of these."""
    from limbeck.registry.gate import approvals
    from limbeck.registry.provenance import attestation

    found: dict[str, Any] = {}
    requests = [each.request for each in approvals.open_requests(store, version.name)]
    if own := [request for request in requests if request.version == version.version]:
        answers = {request.alias: approvals.request_and_answers(store, version, request.alias)[1] for request in own}
        found["requests"] = [{"request": each, "answers": answers[each.alias]} for each in own]
    if bill := attestation.find_sbom(store, version):
        found["sbom"] = bill.digest
    return found


def _request_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for each in found.get("requests", ()):
        request = each["request"]
        yield f"{request.alias} is asked for by {request.who}", request.reason
        for answer in each["answers"]:
            yield f"  {answer.answer} by {answer.who}", answer.reason
    if "sbom" in found:
        yield "SBOM", found["sbom"]


def _step(node: LineageNode) -> tuple[str, str, str | None]:
    known = node.version
    return (node.ref, known.kind, known.digest[:12]) if known else (node.ref, "not there any more", None)


def _files(store: Store, version: Version) -> dict[str, int] | None:
    """Path -> bytes, of a version whose files are on this machine; None of others, which are not fetched for it."""
    folder = store.artifacts.find_local_folder(version)
    if folder is None:
        return None
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _print_scorecard(card: Scorecard) -> None:
    relative = card.relative
    rows = []
    for task, result in card.tasks.items():
        kept = relative.task_retention.get(task) if relative else None
        value = f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")
        interval = f"{kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]" if kept else None
        overlap = card.contamination.tasks.get(task) if card.contamination else None
        held = f"{overlap.contaminated:,}" if overlap else None
        rows.append((task, result.metric, value, f"{result.documents:,}", held, interval))
    against = f", against {relative.teacher}" if relative else ""
    columns = ["task", "metric", "value", "documents", "in training text", "retention"]
    print_table(f"scored {card.created:%Y-%m-%d %H:%M} with {card.harness}{against}", columns, rows)
    if card.cost:
        figures = {k: v for k, v in card.cost.model_dump().items() if isinstance(v, int | float | str)}
        print_table("cost", ["figure", "value"], _format_figures(figures))


def _format_figures(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Figures as a table shows them: counts with commas, measured numbers to four digits."""

    def said(value: Any) -> Any:
        if isinstance(value, bool | str):
            return value
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    return [(name, said(value)) for name, value in figures.items()]


@click.command()
@click.argument("model")
@format_option
def lineage(model: str, output_format: str) -> None:
    """The tree that MODEL is in: teacher, student, ONNX variant.

    NAME/VERSION or NAME@ALIAS: the way up to its teacher, and all that was made of it. NAME: every tree.
    """
    from limbeck.registry.catalog.lineage import lineage_trees as trees

    found = trees(_store(), model)
    if output_format == "json":
        print_json([tree.json() for tree in found])
        return
    for tree in found:
        print_table("", ["version", "kind", "recipe", "precision", "aliases", "digest"], _tree_rows(tree))


@click.command()
@click.argument("ref")
@click.option("--output", "file", type=click.Path(path_type=Path), help="A file instead of stdout, such as README.md.")
def card(ref: str, file: Path | None) -> None:
    """The model card of REF, NAME/VERSION or NAME@ALIAS: Hugging Face's Markdown, written from the records."""
    from limbeck.registry.catalog.model_card import model_card as write

    store = _store()
    write_report(write(store, store.get(ref)), file)


def _tree_rows(node: LineageNode, before: str = "", branch: str = "", below: str = "") -> Iterator[tuple[Any, ...]]:
    known = node.version
    label = before + branch + node.ref
    if known is None:
        yield (label, "not there any more", None, None, None, None)
    else:
        yield (label, known.kind, known.recipe, known.precision, " ".join(known.aliases), known.digest[:12])
    for child in node.children:
        last = child is node.children[-1]
        yield from _tree_rows(child, before + below, "└─ " if last else "├─ ", "   " if last else "│  ")


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
