"""`limbeck models`, `promote`, `rollback` and `doctor`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.errors import BadInput, Refused
from registry.terminal import format_option, print_json, print_table, say

if TYPE_CHECKING:
    from registry.lineage import Node
    from registry.promotion import Candidate
    from registry.records import LedgerEntry, Scorecard, Version
    from registry.store import Store

POLICY = Path("policy.toml")
adopt_option = click.option(
    "--adopt", is_flag=True, help="Go on where the alias was moved through MLflow itself; it goes into the ledger."
)


@click.group()
def models() -> None:
    """Browse the registry: list, show, lineage, history."""


@models.command("list")
@click.argument("name", required=False)
@click.option("--filter", "query", default="", help="MLflow's language, as in \"tags.`limbeck.precision` = 'int8'\".")
@format_option
def list_(name: str | None, query: str, output: str) -> None:
    """The versions of NAME, or of all models."""
    store = _store()
    try:
        versions = store.versions(name, query)
    except BadInput as error:
        raise BadInput(f"--filter {query!r}: {error.message}", fix="write \"tags.`limbeck.kind` = 'onnx'\"") from None
    if name and not versions and not query:
        raise store.unknown(name)
    if output == "json":
        print_json(versions)
        return
    columns = ["version", "kind", "recipe", "precision", "parameters", "made from", "aliases", "created", "digest"]
    print_table("versions", columns, [_row(version) for version in versions])


def _row(version: Version) -> tuple[Any, ...]:
    from registry.lineage import ancestor

    return (
        version.ref,
        version.kind,
        version.recipe,
        version.precision,
        f"{version.params:,}" if version.params is not None else None,
        ancestor(version),
        " ".join(version.aliases),
        f"{version.created:%Y-%m-%d %H:%M}",
        version.digest[:12],
    )


@models.command()
@click.argument("ref")
@format_option
def show(ref: str, output: str) -> None:
    """All that is known of the version REF: NAME/VERSION or NAME@ALIAS."""
    store = _store()
    version = store.get(ref)
    cards = store.scorecards(version)
    parity = store.parity(version)
    verdicts = store.verdicts(version)
    files = _files(store, version)
    if output == "json":
        about = {"scorecards": cards, "parity": parity, "verdicts": verdicts, "files": files, "use": _use(version)}
        print_json(version.model_dump(mode="json") | about)
        return
    fields = version.model_dump(exclude={"name", "version", "aliases"}, exclude_none=True)
    fields["created"] = f"{version.created:%Y-%m-%d %H:%M:%S}"
    fields["aliases"] = " ".join(version.aliases) or None
    if version.engine == "endpoint":
        from registry.resolve import registered

        fields["endpoint"] = registered(version, store).endpoint.label  # type: ignore[union-attr]
    print_table(version.ref, ["field", "value"], fields.items())
    if files:
        print_table("files", ["file", "bytes"], [(file, f"{size:,}") for file, size in files.items()])
    if cards:
        _print_card(cards[-1])
        if len(cards) > 1:
            say(f"  and {len(cards) - 1} older scorecards; --format json has them all")
    if parity:
        rows = parity.model_dump(exclude={"reference", "precision"}).items()
        print_table("against PyTorch, on held-out text", ["field", "value"], rows)
    if verdicts:
        rules = [(rule.rule, rule.outcome, rule.message) for rule in verdicts[-1].rules]
        print_table(f"newest verdict: {verdicts[-1].outcome}", ["rule", "outcome", "numbers"], rules)
    print_table("use it", ["command"], [(line,) for line in _use(version)])


def _files(store: Store, version: Version) -> dict[str, int] | None:
    """Path -> bytes, of a version whose files are on this machine; None of others, which are not fetched for it."""
    folder = store.at_hand(version)
    if folder is None:
        return None
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _print_card(card: Scorecard) -> None:
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
        print_table("cost", ["figure", "value"], figures.items())


def _use(version: Version) -> list[str]:
    """The commands that make something of a version."""
    ref = version.ref
    if version.kind == "onnx":
        return [
            f"limbeck generate {ref} PROMPT",
            f"limbeck serve {ref}",
            f"limbeck deploy {ref} --to DIR",
            f"limbeck promote {ref} --to production",
        ]
    score = f"limbeck eval {ref} --tasks TASK,... --against {version.teacher or 'TEACHER'}"
    return [score] if version.engine == "endpoint" else [f"limbeck export {ref} --precision fp32,int8", score]


@models.command()
@click.argument("model")
@format_option
def lineage(model: str, output: str) -> None:
    """The tree that MODEL is in: teacher, student, ONNX variant.

    NAME/VERSION or NAME@ALIAS: the way up to its teacher, and all that was made of it. NAME: every tree.
    """
    from registry.lineage import lineage as trees

    found = trees(_store(), model)
    if output == "json":
        print_json([tree.json() for tree in found])
        return
    for tree in found:
        print_table("", ["version", "kind", "recipe", "precision", "aliases", "digest"], _tree_rows(tree))


def _tree_rows(node: Node, before: str = "", branch: str = "", below: str = "") -> Iterator[tuple[Any, ...]]:
    known = node.version
    label = before + branch + node.ref
    if known is None:
        yield (label, "not there any more", None, None, None, None)
    else:
        yield (label, known.kind, known.recipe, known.precision, " ".join(known.aliases), known.digest[:12])
    for child in node.children:
        last = child is node.children[-1]
        yield from _tree_rows(child, before + below, "└─ " if last else "├─ ", "   " if last else "│  ")


@models.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Exit 1 where an entry was changed, or an alias moved behind our back.")
@format_option
def history(name: str, verify: bool, output: str) -> None:
    """The alias moves of NAME, from its ledger."""
    from registry import ledger

    book = ledger.read(_store(), name)
    problems = book.problems()
    if output == "json":
        print_json({"name": name, "aliases": book.aliases, "entries": book.entries, "problems": problems})
    else:
        _print_entries(name, book.entries)
    for alias in sorted({entry.alias for entry in book.entries}):
        if (entry := book.unfinished(alias)) and not book.moved(alias):
            say(f"entry {entry.sequence} is not carried out yet; the next promotion or rollback does it")
    if verify and problems:
        raise Refused("\n".join([f"the ledger of {name} and its aliases do not agree:", *_indented(problems)]))
    if problems:
        say("\n".join(["not as it should be:", *_indented(problems)]))
    elif verify:
        say(f"{len(book.entries)} entries, each in its place")


def _print_entries(name: str, entries: Iterable[LedgerEntry]) -> None:
    columns = ["entry", "when", "alias", "action", "from", "to", "who", "verdict", "reason"]
    rows = [
        (
            entry.sequence,
            f"{entry.when:%Y-%m-%d %H:%M:%S}",
            entry.alias,
            entry.action,
            entry.from_version,
            entry.to_version,
            entry.who,
            entry.verdict and entry.verdict[:12],
            entry.reason or None,
        )
        for entry in entries
    ]
    print_table(f"alias moves of {name}", columns, rows)


@click.command()
@click.argument("model")
@click.option("--to", "alias", default="production", show_default=True, help="The alias to move.")
@click.option("--policy", "path", type=click.Path(path_type=Path), help="A policy.  [default: ./policy.toml]")
@click.option("--reason", default="", help="Kept in the ledger.")
@click.option("--dry-run", is_flag=True, help="Judge, and write nothing.")
@adopt_option
@format_option
def promote(model: str, alias: str, path: Path | None, reason: str, dry_run: bool, adopt: bool, output: str) -> None:
    """Move an alias to a version that passes the policy.

    MODEL is NAME/VERSION or NAME@ALIAS; or NAME alone for the cheapest of its ONNX variants that pass. Exit
    code 1 where none does, with each rule and its numbers: then nothing moves.
    """
    from registry.policy import load
    from registry.promotion import Vetoed
    from registry.promotion import promote as run

    if path is None and not POLICY.exists():
        raise BadInput("no policy to judge by: there is no policy.toml here", fix="give one: --policy FILE")
    policy = load(path or POLICY)
    try:
        done = run(_store(), model, alias, policy, reason=reason, dry_run=dry_run, adopt=adopt)
    except Vetoed as veto:
        if output == "json":
            print_json(_promotion_json(alias, veto.candidates))
        raise
    if output == "json":
        print_json(
            _promotion_json(alias, done.candidates)
            | {"chosen": done.chosen.ref, "from_version": done.before, "moved": bool(done.entry), "entry": done.entry}
        )
    else:
        _print_candidates(done.candidates)
    if done.before == done.chosen.version:
        say(f"{done.name}@{alias} is {done.chosen.ref} already")
    else:
        was = f"{done.name}/{done.before}" if done.before is not None else "nothing"
        say(f"{done.name}@{alias} {'would be' if dry_run else 'is now'} {done.chosen.ref} (it was {was})")


def _promotion_json(alias: str, candidates: list[Candidate]) -> dict[str, Any]:
    return {
        "alias": alias,
        "chosen": None,
        "from_version": None,
        "moved": False,
        "entry": None,
        "candidates": [
            {
                "version": c.version.ref,
                "usd_per_million_tokens": c.card.cost.usd_per_million_tokens if c.card and c.card.cost else None,
                "verdict": c.verdict,
            }
            for c in candidates
        ],
    }


def _print_candidates(candidates: list[Candidate]) -> None:
    rows = [
        (
            c.version.ref,
            c.version.recipe,
            c.version.precision,
            f"{c.price:.4g}" if c.card and c.card.cost else None,
            c.verdict.outcome,
            "\n".join(f"{rule.rule}: {rule.message}" for rule in c.failing) or None,
        )
        for c in candidates
    ]
    columns = ["version", "recipe", "precision", "usd per million tokens", "verdict", "what does not pass"]
    print_table("candidates, cheapest first", columns, rows)


@click.command()
@click.argument("name")
@click.option("--alias", default="production", show_default=True, help="The alias to move.")
@click.option("--reason", default="", help="Kept in the ledger.")
@adopt_option
@format_option
def rollback(name: str, alias: str, reason: str, adopt: bool, output: str) -> None:
    """Put an alias back on the version before; its files are verified first.

    Rolling back the first promotion takes the alias away.
    """
    from registry.promotion import rollback as run

    entry = run(_store(), name, alias, reason=reason, adopt=adopt)
    if output == "json":
        print_json(entry)
    else:
        _print_entries(name, [entry])
    now = f"is {name}/{entry.to_version} again" if entry.to_version is not None else "is taken away"
    say(f"{name}@{alias} {now} (it was {name}/{entry.from_version})")


@click.command()
@click.option("--deep", is_flag=True, help="Verify the digest of every version's files (fetches them from a server).")
@format_option
def doctor(deep: bool, output: str) -> None:
    """What is installed, reachable, and what is wrong. Exit code 1 where something is wrong."""
    from registry.doctor import examine

    checks = list(examine(deep=deep))
    if output == "json":
        print_json([check.json() for check in checks])
    else:
        print_table("", ["", "what", "found"], [(check.state, check.what, check.found) for check in checks])
    wrong = [check for check in checks if check.state == "wrong"]
    if wrong:
        raise Refused("\n".join([f"{len(wrong)} things are wrong:", *_indented(f"{c.what}: {c.fix}" for c in wrong)]))


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _store() -> Store:
    from registry.store import Store

    return Store()
