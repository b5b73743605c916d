"""`limbeck cache`: the stored words of teachers."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.terminal import format_bytes, format_option, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.distill.cache.inventory import CacheInfo


@click.group()
def cache() -> None:
    """The teacher caches of this machine: list, verify, prune."""


@cache.command("list")
@format_option
def list_(output_format: str) -> None:
    """What is stored: teacher, form, size, when it was last used."""
    from limbeck.distill.cache.inventory import list_caches

    every = list_caches()
    if output_format == "json":
        print_json([_json(each) for each in every])
        return
    columns = ["id", "teacher", "form", "tokens", "size", "bytes a token", "shards", "last used"]
    print_table(f"teacher caches, {format_bytes(sum(each.disk_bytes for each in every))}", columns, map(_row, every))


def _row(each: CacheInfo) -> tuple[Any, ...]:
    return (
        each.id,
        each.about.get("teacher"),
        each.form,
        f"{each.tokens:,}",
        format_bytes(each.disk_bytes),
        f"{each.bytes_per_token:.1f}" if each.bytes_per_token else None,
        each.shards if each.captured == each.shards else f"{each.captured} of {each.shards}",
        f"{each.last_used:%Y-%m-%d %H:%M}",
    )


def _json(each: CacheInfo) -> dict[str, Any]:
    return {"id": each.id, "form": each.form, "bytes_per_token": each.bytes_per_token, **each._asdict()}


@cache.command()
@click.argument("ids", nargs=-1)
@format_option
def verify(ids: tuple[str, ...], output_format: str) -> None:
    """Check every shard against the checksum taken when it was written; all caches, or those given by ID.

    Exit code 1 where one is damaged.
    """
    from limbeck.distill.cache.inventory import find_caches, list_caches

    found = [(each, each.damaged_shards()) for each in (find_caches(ids) if ids else list_caches())]
    if output_format == "json":
        print_json([_json(each) | {"damaged": damaged} for each, damaged in found])
    else:
        print_table(
            "",
            ["id", "teacher", "form", "shards", "damaged"],
            [
                (each.id, each.about.get("teacher"), each.form, each.captured, " ".join(damaged) or "none")
                for each, damaged in found
            ],
        )
    wrong = [each for each, damaged in found if damaged]
    if wrong:
        lines = [f"{len(wrong)} of {len(found)} caches are damaged; the next run that needs one captures what is:"]
        raise Refused("\n".join([*lines, *(f"  {each.id}: {_rebuild(each)}" for each in wrong)]))


def _rebuild(each: CacheInfo) -> str:
    recipe = each.about.get("recipe")
    return f"limbeck distill {recipe}" if recipe else f"or remove it: limbeck cache prune {each.id}"


@cache.command()
@click.argument("ids", nargs=-1)
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Those not used for so long.")
@click.option("--to-size", type=click.FloatRange(min=0), metavar="GB", help="Those used least lately, down to so much.")
@click.option("--unregistered", is_flag=True, help="Those of teachers that are not in the registry any more.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@format_option
def prune(
    ids: tuple[str, ...],
    older_than: float | None,
    to_size: float | None,
    unregistered: bool,
    everything: bool,
    dry_run: bool,
    yes: bool,
    output_format: str,
) -> None:
    """Remove caches: those given by ID, and those that the options choose.

    A cache that a run is filling or reading stays. What is removed costs another pass of its teacher.
    """
    from limbeck.distill.cache.inventory import find_caches, list_caches, remove_cache

    if not (ids or older_than is not None or to_size is not None or unregistered or everything):
        raise BadInput("nothing says what to remove", fix="give ids, --older-than, --to-size, --unregistered or --all")
    chosen = {each.id for each in find_caches(ids)}
    every = list_caches()
    if everything:
        chosen |= {each.id for each in every}
    if older_than is not None:
        limit = datetime.now(UTC) - timedelta(days=older_than)
        chosen |= {each.id for each in every if each.last_used < limit}
    if unregistered:
        chosen |= _unregistered(every)
    if to_size is not None:
        chosen |= _over_size_limit([each for each in every if each.id not in chosen], to_size * 1e9)
    going = [each for each in every if each.id in chosen]
    if going and not (dry_run or yes):
        _ask(going)
    removed = {each.id: not dry_run and remove_cache(each) for each in going}
    if output_format == "json":
        print_json([_json(each) | {"removed": removed[each.id]} for each in going])
    else:
        rows = [(*_row(each)[:3], format_bytes(each.disk_bytes), _outcome(removed[each.id], dry_run)) for each in going]
        print_table("", ["id", "teacher", "form", "size", ""], rows)
    if dry_run:
        print_status(f"{format_bytes(sum(each.disk_bytes for each in going))} would be freed")
        return
    print_status(f"{format_bytes(sum(each.disk_bytes for each in going if removed[each.id]))} freed")


def _outcome(removed: bool, dry_run: bool) -> str:
    if dry_run:
        return "would be removed"
    return "removed" if removed else "in use, stays"


def _unregistered(every: list[CacheInfo]) -> set[str]:
    from limbeck.registry.mlflow.store import Store

    known = {version.digest for version in Store().versions()}
    return {each.id for each in every if each.settings.get("teacher") not in known}


def _over_size_limit(every: list[CacheInfo], limit: float) -> set[str]:
    """Those that do not fit, where the ones used last are kept first."""
    chosen, total = set(), 0.0
    for each in every:
        total += each.disk_bytes
        if total > limit:
            chosen.add(each.id)
    return chosen


def _ask(going: list[CacheInfo]) -> None:
    question = f"Remove {len(going)} caches, {format_bytes(sum(each.disk_bytes for each in going))}?"
    if not sys.stdin.isatty():
        raise BadInput(f"{question} There is no terminal to ask at", fix="say --yes, or look first with --dry-run")
    click.confirm(question, abort=True)
