"""`limbeck cache`: the teacher caches of this machine."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.terminal import format_bytes, format_option, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.distill.cache.inventory import CacheInfo


@click.group()
def cache() -> None:
    """List, verify and prune the teacher caches of this machine."""


@cache.command("list")
@format_option
def list_(output_format: str) -> None:
    """List the teacher caches: teacher, form, size, and when they were last used."""
    from limbeck.distill.cache.inventory import list_caches

    caches = list_caches()
    if output_format == "json":
        print_json([_as_json(each) for each in caches])
        return
    columns = ["id", "teacher", "form", "tokens", "size", "bytes per token", "shards", "last used"]
    print_table(f"teacher caches, {format_bytes(_total_bytes(caches))}", columns, map(_row, caches))


def _row(info: CacheInfo) -> tuple[Any, ...]:
    return (
        info.id,
        info.about.get("teacher"),
        info.form,
        f"{info.tokens:,}",
        format_bytes(info.disk_bytes),
        f"{info.bytes_per_token:.1f}" if info.bytes_per_token else None,
        info.shards if info.captured == info.shards else f"{info.captured} of {info.shards}",
        f"{info.last_used:%Y-%m-%d %H:%M}",
    )


def _as_json(info: CacheInfo) -> dict[str, Any]:
    return {"id": info.id, "form": info.form, "bytes_per_token": info.bytes_per_token, **info._asdict()}


def _total_bytes(caches: list[CacheInfo]) -> int:
    return sum(each.disk_bytes for each in caches)


@cache.command()
@click.argument("ids", nargs=-1)
@format_option
def verify(ids: tuple[str, ...], output_format: str) -> None:
    """Check every shard against the checksum of when it was written: of all caches, or of those given by ID.

    Exit code 1 if one is damaged.
    """
    from limbeck.distill.cache.inventory import find_caches, list_caches

    checked = [(each, each.damaged_shards()) for each in (find_caches(ids) if ids else list_caches())]
    if output_format == "json":
        print_json([_as_json(each) | {"damaged": shards} for each, shards in checked])
    else:
        print_table(
            "",
            ["id", "teacher", "form", "shards", "damaged"],
            [
                (each.id, each.about.get("teacher"), each.form, each.captured, " ".join(shards) or "none")
                for each, shards in checked
            ],
        )
    damaged = [each for each, shards in checked if shards]
    if damaged:
        summary = f"{len(damaged)} of {len(checked)} caches are damaged; the next run that needs one captures it again:"
        raise Refused("\n".join([summary, *(f"  {each.id}: {_rebuild_command(each)}" for each in damaged)]))


def _rebuild_command(info: CacheInfo) -> str:
    recipe = info.about.get("recipe")
    return f"limbeck distill {recipe}" if recipe else f"or remove it: limbeck cache prune {info.id}"


class _Selection(NamedTuple):
    """The caches that a user wants to remove, by the arguments and options of `limbeck cache prune`."""

    ids: tuple[str, ...]
    older_than: float | None
    to_size: float | None
    unregistered: bool
    everything: bool

    @property
    def is_empty(self) -> bool:
        return self == _Selection((), None, None, False, False)


@cache.command()
@click.argument("ids", nargs=-1)
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Caches that were last used before.")
@click.option("--to-size", type=click.FloatRange(min=0), metavar="GB", help="The least recently used, down to a size.")
@click.option("--unregistered", is_flag=True, help="Caches of teachers that are not in the registry.")
@click.option("--all", "everything", is_flag=True, help="All caches.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@format_option
def prune(dry_run: bool, yes: bool, output_format: str, **selection: Any) -> None:
    """Remove caches: those given by ID, and those that the options select.

    A cache that a run is filling or reading stays. A removed cache costs another pass of its teacher.
    """
    from limbeck.distill.cache.inventory import remove_cache

    selected = _select(_Selection(**selection))
    if selected and not (dry_run or yes):
        _ask(selected)
    removed = {each.id: not dry_run and remove_cache(each) for each in selected}
    if output_format == "json":
        print_json([_as_json(each) | {"removed": removed[each.id]} for each in selected])
    else:
        rows = [
            (*_row(each)[:3], format_bytes(each.disk_bytes), _outcome(removed[each.id], dry_run)) for each in selected
        ]
        print_table("", ["id", "teacher", "form", "size", ""], rows)
    if dry_run:
        print_status(f"{format_bytes(_total_bytes(selected))} would be freed")
        return
    print_status(f"{format_bytes(_total_bytes([each for each in selected if removed[each.id]]))} freed")


def _select(selection: _Selection) -> list[CacheInfo]:
    """The selected caches. Raises BadInput if nothing selects any, or an id is not of one cache."""
    from limbeck.distill.cache.inventory import find_caches, list_caches

    if selection.is_empty:
        raise BadInput(
            "nothing selects what to remove", fix="give ids, --older-than, --to-size, --unregistered or --all"
        )
    ids = {each.id for each in find_caches(selection.ids)}
    caches = list_caches()
    if selection.everything:
        ids |= {each.id for each in caches}
    if selection.older_than is not None:
        limit = datetime.now(UTC) - timedelta(days=selection.older_than)
        ids |= {each.id for each in caches if each.last_used < limit}
    if selection.unregistered:
        ids |= _unregistered_ids(caches)
    if selection.to_size is not None:
        ids |= _ids_over_size([each for each in caches if each.id not in ids], selection.to_size * 1e9)
    return [each for each in caches if each.id in ids]


def _outcome(removed: bool, dry_run: bool) -> str:
    if dry_run:
        return "would be removed"
    return "removed" if removed else "in use, stays"


def _unregistered_ids(caches: list[CacheInfo]) -> set[str]:
    from limbeck.registry.mlflow.store import Store

    registered = {version.digest for version in Store().versions()}
    return {each.id for each in caches if each.settings.get("teacher") not in registered}


def _ids_over_size(caches: list[CacheInfo], limit: float) -> set[str]:
    """The caches that do not fit in `limit` bytes; `caches` begin with the most recently used, which stay."""
    ids, total = set(), 0.0
    for each in caches:
        total += each.disk_bytes
        if total > limit:
            ids.add(each.id)
    return ids


def _ask(selected: list[CacheInfo]) -> None:
    question = f"Remove {len(selected)} caches, {format_bytes(_total_bytes(selected))}?"
    if not sys.stdin.isatty():
        raise BadInput(f"{question} There is no terminal to ask in", fix="add --yes, or look first with --dry-run")
    click.confirm(question, abort=True)
