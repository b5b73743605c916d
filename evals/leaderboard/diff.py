"""Compare two versions: their fields, recipes, quality and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from limbeck.evals.cost.measure import is_comparable, is_same_run, median_estimate, paired_cost_ratio
from limbeck.evals.scores.comparability import describe_cost_difference
from limbeck.evals.scores.compare import compare_models
from limbeck.registry.catalog.lineage import run_parameters
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import FIGURES, USD, ComparedModels, Cost, Estimate, Record, Version

# What a figure varies with -> whether the ratio of two measurements has a meaning.
COMPARES: dict[str, Callable[[Cost, Cost], bool]] = {
    "nothing": lambda a, b: True,
    "machine": is_comparable,
    "time": is_same_run,
}
IGNORED_FIELDS = {"name", "version", "source", "created", "run_id", "author"}  # they nearly always differ


class ChangedField(Record):
    """A field or parameter that differs; None if a side does not have it."""

    name: str
    a: str | None
    b: str | None


class ComparedCost(Record):
    """One cost figure of both versions."""

    figure: str
    a: float | None
    b: float | None
    ratio: float | None  # A over B; None if they were not measured the same way
    ratio_interval: Estimate | None = None  # if both were measured in turn, in one run


class Diff(Record):
    """`limbeck models diff A B --format json`. Stable: fields are only ever added."""

    a: Version
    b: Version
    fields: tuple[ChangedField, ...]  # of the versions
    recipe: tuple[ChangedField, ...]  # parameters of the runs that made them
    no_recipe: str | None  # why there is nothing to compare
    quality: ComparedModels | None  # A is the candidate, B the reference: differences are A - B
    no_quality: str | None  # why no documents were compared
    cost: tuple[ComparedCost, ...]
    no_cost: str | None  # why some figures have no ratio, or no figure is known


def diff_versions(store: Store, a: str, b: str) -> Diff:
    """Compare two registered versions.

    Args:
        a, b: `NAME/VERSION` or `NAME@ALIAS`. Differences are A - B, ratios A over B.

    Raises:
        BadInput: no such version.
    """
    ours, theirs = store.get(a), store.get(b)
    parameters, no_recipe = _recipes(store, ours, theirs)
    quality, no_quality = _quality(store, ours, theirs)
    costs, no_cost = _costs(store, ours, theirs)
    exclude = IGNORED_FIELDS - ({"name"} if ours.name != theirs.name else set())
    return Diff(
        a=ours,
        b=theirs,
        fields=_changed_fields(
            *(_fields_as_text(each.model_dump(mode="json", exclude=exclude)) for each in (ours, theirs))
        ),
        recipe=parameters,
        no_recipe=no_recipe,
        quality=quality,
        no_quality=no_quality,
        cost=costs,
        no_cost=no_cost,
    )


def _fields_as_text(fields: Mapping[str, object]) -> dict[str, str]:
    """The fields that are set, as text."""
    return {
        name: " ".join(value) if isinstance(value, list) else str(value)
        for name, value in fields.items()
        if value not in (None, [])
    }


def _changed_fields(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[ChangedField, ...]:
    names = dict.fromkeys([*a, *b])
    return tuple(ChangedField(name=n, a=a.get(n), b=b.get(n)) for n in names if a.get(n) != b.get(n))


def _recipes(store: Store, a: Version, b: Version) -> tuple[tuple[ChangedField, ...], str | None]:
    if a.run_id == b.run_id and a.run_id is not None:
        return (), "one training run made both"
    found = []
    for version in (a, b):
        try:
            found.append(run_parameters(store, version))
        except NotFound:
            return (), f"the run that made {version.ref} is gone"
    for version, parameters in zip((a, b), found, strict=True):
        if not parameters:
            return (), f"no training run of {version.ref} is recorded"
    return _changed_fields(*found), None


def _quality(store: Store, a: Version, b: Version) -> tuple[ComparedModels | None, str | None]:
    if a.digest == b.digest:
        return None, "they are the same files"
    try:
        return compare_models(f"models:/{a.ref}", f"models:/{b.ref}", store=store), None
    except BadInput as error:  # nothing in common; documents that do not pair
        why = error.message.replace("models:/", "")
        return None, f"{why}; run: limbeck eval {a.ref} {b.ref} --tasks TASK,..."


def _costs(store: Store, a: Version, b: Version) -> tuple[tuple[ComparedCost, ...], str | None]:
    """Compare the newest costs of one run; if there are none, costs of the same setting; else the newest of each."""
    known = [[card.cost for card in reversed(store.findings.scorecards(version)) if card.cost] for version in (a, b)]
    if missing := [version.ref for version, costs in zip((a, b), known, strict=True) if not costs]:
        ours, theirs = (costs[0] if costs else None for costs in known)
        return _rows(ours, theirs), f"the cost of {' and '.join(missing)} is not measured"
    ours, theirs = _choose_costs(*known)
    if is_same_run(ours, theirs):
        return _rows(ours, theirs), None
    if is_comparable(ours, theirs):
        why = "times were not measured in turn, in one run"
    else:
        why = describe_cost_difference(ours, theirs)
    return _rows(ours, theirs), f"{why}; run: limbeck eval {a.ref} {b.ref} --tasks TASK,... --force"


def _choose_costs(ours: Sequence[Cost], theirs: Sequence[Cost]) -> tuple[Cost, Cost]:
    for matches in (is_same_run, is_comparable):
        for own in ours:
            for other in theirs:
                if matches(own, other):
                    return own, other
    return ours[0], theirs[0]


def _rows(a: Cost | None, b: Cost | None) -> tuple[ComparedCost, ...]:
    if a is None and b is None:
        return ()
    return tuple(_row(figure, a, b) for figure in FIGURES)


def _row(figure: str, a: Cost | None, b: Cost | None) -> ComparedCost:
    """One figure of both, with its ratio if both were measured so that a ratio has a meaning."""
    ours, theirs = getattr(a, figure, None), getattr(b, figure, None)
    if a is None or b is None or not COMPARES[FIGURES[figure].varies_with](a, b):
        return ComparedCost(figure=figure, a=ours, b=theirs, ratio=None)
    paired = _paired_ratio(figure, a, b) if a.loads and b.loads else None
    ratio = ours / theirs if ours is not None and theirs else None
    if paired:
        ratio = paired.value
    return ComparedCost(figure=figure, a=ours, b=theirs, ratio=ratio, ratio_interval=paired)


def _paired_ratio(figure: str, a: Cost, b: Cost) -> Estimate | None:
    """The ratio over the rounds of one run; None for a figure without one."""
    if figure == USD:
        return paired_cost_ratio(a, b)
    if figure == "p50_ms":
        pairs = zip(a.loads[0].request_ms, b.loads[0].request_ms, strict=True)
        return median_estimate([ours / theirs for ours, theirs in pairs])
    return None
