"""`limbeck models list`, `show`, `lineage` and `card`.

The filters of `list` (`--since`, `--metric`, `--tag`, ...) are applied by `limbeck.registry.catalog.search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from limbeck.registry.core.errors import BadInput, LimbeckError
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
    from limbeck.registry.records import Parity, Scorecard, Verdict, Version


@click.command("list")
@click.argument("name", required=False)
@click.option("--kind", help="teacher, student or onnx.")
@click.option("--recipe", help="The recipe's label.")
@click.option("--precision", help="fp32, int8-weight or int4.")
@click.option("--parent", help="NAME/VERSION it was made from.")
@click.option("--teacher", help="NAME/VERSION it was distilled from.")
@click.option("--licence", help="In upper or lower case.")
@click.option("--author", help="Who registered it.")
@click.option("--alias", help="An alias that points at it.")
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="A tag of MLflow; repeatable.")
@click.option(
    "--metric", "metrics", metavar="COMPARISON", multiple=True, help="Such as 'retention >= 0.9'; repeatable."
)
@click.option("--since", metavar="DATE", help="Registered on DATE or later.")
@click.option("--until", metavar="DATE", help="Registered before DATE.")
@click.option(
    "--filter",
    "query",
    default="",
    help="In MLflow's filter language, such as \"tags.`limbeck.precision` = 'int8-weight'\".",
)
@click.option("--sort", metavar="KEY", help="A column or metric; -KEY for descending order.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N versions.")
@format_option
def list_(  # noqa: PLR0913 (one parameter per option)
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
    """List the versions of NAME, or of all models, that match all given options."""
    from limbeck.registry.catalog.search import Query, build_conditions, parse_date, search_versions

    store = _store()
    try:
        conditions = build_conditions(fields, tags, metrics, query)
    except BadInput as error:
        raise BadInput(f"--filter {query!r}: {error.message}", fix=error.fix) if query else error from None
    earliest, latest = (parse_date(text) if text else None for text in (since, until))
    hits = search_versions(store, name, Query(conditions, earliest, latest, alias, sort, limit))
    has_filters = conditions or since or until or alias
    if name and not hits and not has_filters:
        raise store.not_found_error(name)
    if output_format == "json":
        print_json([_hit_json(hit) for hit in hits])
        return
    shown_metrics = list(dict.fromkeys(metric for hit in hits for metric in hit.metrics))
    columns = ["version", "kind", "recipe", "precision", "parameters", "made from", "aliases", "created", "digest"]
    print_table("versions", columns + shown_metrics, [_hit_row(hit, shown_metrics) for hit in hits])


def _hit_json(hit: SearchHit) -> dict[str, Any]:
    if hit.version is None:
        name, _, number = hit.ref.rpartition("/")
        return {"name": name, "version": int(number), "unreadable": hit.unreadable}
    return hit.version.model_dump(mode="json") | ({"metrics": hit.metrics} if hit.metrics else {})


def _hit_row(hit: SearchHit, metrics: list[str]) -> tuple[Any, ...]:
    values = tuple(f"{hit.metrics[metric]:.4g}" if metric in hit.metrics else None for metric in metrics)
    if hit.version is None:
        return (hit.ref, f"unreadable: {hit.unreadable}", *[None] * 7, *values)
    return (*_version_row(hit.version), *values)


def _version_row(version: Version) -> tuple[Any, ...]:
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
    """Print everything recorded about the version REF: NAME/VERSION or NAME@ALIAS."""
    from limbeck.registry.catalog.lineage import lineage_path
    from limbeck.registry.catalog.snippets import command_snippets, python_snippets

    store = _store()
    version = store.get(ref)
    scorecards = store.findings.scorecards(version)
    parity = store.findings.parity(version)
    verdicts = store.findings.verdicts(version)
    files = _local_files(store, version)
    origin = _origin(store, version)
    requests_and_sbom = _requests_and_sbom(store, version)
    if output_format == "json":
        fields: dict[str, Any] = {"scorecards": scorecards, "parity": parity, "verdicts": verdicts, "files": files}
        fields |= {"origin": origin}
        fields |= {"lineage": [node.ref for node in lineage_path(store, version)]}
        fields |= {"use": command_snippets(version), "python": python_snippets(version)}
        print_json(version.model_dump(mode="json") | fields | requests_and_sbom)
        return
    print_table(version.ref, ["field", "value"], (_version_fields(store, version) | _origin_row(origin)).items())
    if files:
        print_table("files", ["file", "bytes"], [(file, f"{size:,}") for file, size in files.items()])
    _print_findings(scorecards, parity, verdicts)
    if requests_and_sbom:
        print_table("requests and SBOM", ["what", "value"], _request_rows(requests_and_sbom))
    print_table("lineage", ["version", "kind", "digest"], map(_lineage_row, lineage_path(store, version)))
    print_table("use it", ["command"], [(line,) for line in command_snippets(version)])
    for library, lines in python_snippets(version).items():
        print(f"\nin Python, with {library}:\n" + "\n".join(indent_lines(lines)))


def _origin(store: Store, version: Version) -> dict[str, Any] | None:
    """Where a copied version comes from, after its ledger there was verified; None if it is not a copy."""
    from limbeck.registry.catalog.copy_version import read_origin

    try:
        found = read_origin(store, version)
    except LimbeckError as error:
        print_status(str(error))
        return None
    if found is None:
        return None
    return {"tracking_uri": found.tracking_uri, "version": found.version, "entries": found.entries}


def _origin_row(origin: dict[str, Any] | None) -> dict[str, str]:
    if origin is None:
        return {}
    entries = f"{len(origin['entries'])} ledger entries"
    return {"copied from": f"{origin['version']} of {origin['tracking_uri']}, with {entries}"}


def _version_fields(store: Store, version: Version) -> dict[str, Any]:
    """Field -> value, for the table."""
    fields = version.model_dump(exclude={"name", "version", "aliases"}, exclude_none=True)
    fields["created"] = f"{version.created:%Y-%m-%d %H:%M:%S}"
    fields["aliases"] = " ".join(version.aliases) or None
    if version.engine == "endpoint":
        from limbeck.registry.catalog.model_ref import load_registered_version

        fields["endpoint"] = load_registered_version(version, store).endpoint.label  # type: ignore[union-attr]
    return fields


def _print_findings(scorecards: Sequence[Scorecard], parity: Parity | None, verdicts: Sequence[Verdict]) -> None:
    """Print the newest scorecard, the parity and the newest gate decision."""
    if scorecards:
        _print_scorecard(scorecards[-1])
        if len(scorecards) > 1:
            print_status(f"  and {len(scorecards) - 1} older scorecards; --format json prints them all")
    if parity:
        in_words = {"lengths", "lengths_not_reached", "reading", "quality", "limits", "exceeded", "max_change"}
        figures = parity.model_dump(exclude={"reference", "precision", *in_words}, exclude_none=True)
        rows = [
            ("quality", parity.describe_limits()),
            *_format_figures(figures),
            ("long texts", parity.describe_lengths()),
        ]
        rows.append(("the checkpoint, as loaded", parity.describe_reading()))
        print_table("compared with PyTorch, on held-out text", ["field", "value"], rows)
    if verdicts:
        rules = [(rule.rule, rule.outcome, rule.message) for rule in verdicts[-1].rules]
        print_table(f"newest gate decision: {verdicts[-1].outcome}", ["rule", "outcome", "numbers"], rules)
        if len(verdicts) > 1:
            print_status(f"  and {len(verdicts) - 1} older gate decisions; --format json prints them all")


def _requests_and_sbom(store: Store, version: Version) -> dict[str, Any]:
    """The open requests with their answers, and the digest of the SBOM; without the keys of what does not exist."""
    from limbeck.registry.gate import approvals
    from limbeck.registry.provenance import attestation

    found: dict[str, Any] = {}
    requests = [each.request for each in approvals.open_requests(store, version.name)]
    requests = [request for request in requests if request.version == version.version]
    if requests:
        found["requests"] = [
            {"request": each, "answers": approvals.request_and_answers(store, version, each.alias)[1]}
            for each in requests
        ]
    sbom = attestation.find_sbom(store, version)
    if sbom is not None:
        found["sbom"] = sbom.digest
    return found


def _request_rows(requests_and_sbom: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for each in requests_and_sbom.get("requests", ()):
        request = each["request"]
        yield f"request of {request.who} for {request.alias}", request.reason
        for answer in each["answers"]:
            yield f"  {answer.answer} by {answer.who}", answer.reason
    if "sbom" in requests_and_sbom:
        yield "SBOM", requests_and_sbom["sbom"]


def _lineage_row(node: LineageNode) -> tuple[str, str, str | None]:
    version = node.version
    return (node.ref, version.kind, version.digest[:12]) if version else (node.ref, "deleted", None)


def _local_files(store: Store, version: Version) -> dict[str, int] | None:
    """Path -> bytes, if the version's files are on this machine; else None, without fetching them."""
    folder = store.artifacts.find_local_folder(version)
    if folder is None:
        return None
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _print_scorecard(scorecard: Scorecard) -> None:
    relative, contamination = scorecard.relative, scorecard.contamination
    rows = []
    for task, result in scorecard.tasks.items():
        retention = relative.task_retention.get(task) if relative else None
        value = f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")
        interval = f"{retention.value:.3f} [{retention.low:.3f}, {retention.high:.3f}]" if retention else None
        overlap = contamination.tasks.get(task) if contamination else None
        contaminated = f"{overlap.contaminated:,}" if overlap else None
        rows.append((task, result.metric, value, f"{result.documents:,}", contaminated, interval))
    against = f", against {relative.teacher}" if relative else ""
    columns = ["task", "metric", "value", "documents", "in training text", "retention"]
    title = f"scored {scorecard.created:%Y-%m-%d %H:%M} with {scorecard.harness}{against}"
    print_table(title, columns, rows)
    if scorecard.cost:
        figures = {k: v for k, v in scorecard.cost.model_dump().items() if isinstance(v, int | float | str)}
        print_table("cost", ["figure", "value"], _format_figures(figures))


def _format_figures(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Figures for a table: counts with commas, measured numbers to four digits."""
    return [(name, _format_figure(value)) for name, value in figures.items()]


def _format_figure(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@click.command()
@click.argument("model")
@format_option
def lineage(model: str, output_format: str) -> None:
    """Print the tree of MODEL: teacher, student, ONNX variant.

    NAME/VERSION or NAME@ALIAS: its ancestors, and all that was made from it. NAME: the trees of all its versions.
    """
    from limbeck.registry.catalog.lineage import lineage_trees

    trees = lineage_trees(_store(), model)
    if output_format == "json":
        print_json([tree.json() for tree in trees])
        return
    for tree in trees:
        print_table("", ["version", "kind", "recipe", "precision", "aliases", "digest"], _tree_rows(tree))


@click.command()
@click.argument("ref")
@click.option("--output", "file", type=click.Path(path_type=Path), help="A file instead of stdout, such as README.md.")
def card(ref: str, file: Path | None) -> None:
    """Write the model card of REF, NAME/VERSION or NAME@ALIAS: Hugging Face's Markdown, from the records."""
    from limbeck.registry.catalog.model_card import model_card

    store = _store()
    write_report(model_card(store, store.get(ref)), file)


def _tree_rows(
    node: LineageNode, indent: str = "", branch: str = "", child_indent: str = ""
) -> Iterator[tuple[Any, ...]]:
    """The rows of a tree, drawn with lines. `branch` is drawn before the node, `child_indent` before its children."""
    version = node.version
    label = indent + branch + node.ref
    if version is None:
        yield (label, "deleted", None, None, None, None)
    else:
        aliases = " ".join(version.aliases)
        yield (label, version.kind, version.recipe, version.precision, aliases, version.digest[:12])
    for child in node.children:
        is_last = child is node.children[-1]
        yield from _tree_rows(child, indent + child_indent, "└─ " if is_last else "├─ ", "   " if is_last else "│  ")


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
