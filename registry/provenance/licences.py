"""Licences: whether well-known ones allow training on a model's outputs, and which licences a version is under.

This is a summary, not legal advice: terms change, so each entry names its source. A licence that is not listed is
unknown; a recipe can state the answer (`teacher.licence_allows_distillation`).

Several licences are one SPDX expression: both of `MIT AND CC-BY-4.0` apply, one of `MIT OR GPL-3.0`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.records import Version


class LicenceTerms(NamedTuple):
    """Whether a licence allows a student to learn from a model's outputs, on which terms, and the source of that."""

    allows_distillation: bool
    summary: str
    source: str


_FREE = "it does not restrict the use of outputs"
_SPDX = "https://spdx.org/licenses/"
_COMPETING = "outputs may not be used to develop models that compete with the provider's"
_RAIL = "a distilled model is a derivative: it has to pass on the use restrictions"

# By the identifiers of the Hugging Face hub, of SPDX, or a provider's name for models behind an API.
TERMS = {
    **dict.fromkeys(
        ["apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0",
         "cc-by-sa-4.0", "mpl-2.0", "lgpl-3.0", "gpl-3.0", "agpl-3.0", "odc-by", "psf-2.0"],
        LicenceTerms(True, _FREE, _SPDX),
    ),
    **dict.fromkeys(
        ["cc-by-nc-4.0", "cc-by-nc-sa-4.0"],
        LicenceTerms(True, "for non-commercial purposes", "https://creativecommons.org/licenses/"),
    ),
    **dict.fromkeys(
        ["openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
         "creativeml-openrail-m"],
        LicenceTerms(True, _RAIL, "https://www.licenses.ai/"),
    ),
    "llama2": LicenceTerms(
        False,
        "outputs may not be used to improve another large language model than Llama 2 and its derivatives (1.b.v)",
        "https://ai.meta.com/llama/license/",
    ),
    "llama3": LicenceTerms(
        False,
        "outputs may not be used to improve another large language model than Llama 3 and its derivatives (1.b.v)",
        "https://www.llama.com/llama3/license/",
    ),
    **{
        f"llama{version}": LicenceTerms(
            True,
            'a model trained on outputs has a name that begins with "Llama", and says "Built with Llama" (1.b.i)',
            f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        )
        for version in ("3.1", "3.2", "3.3", "4")
    },
    "gemma": LicenceTerms(
        True,
        "a model distilled from Gemma or its outputs is a model derivative: Gemma's terms go with it (1.1, 3.1)",
        "https://ai.google.dev/gemma/terms",
    ),
    "deepseek": LicenceTerms(
        True,
        "distillation is allowed; a derivative passes on the use restrictions",
        "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL",
    ),
    "qwen": LicenceTerms(
        True,
        'a model trained on outputs and distributed says "Built with Qwen" or "Improved using Qwen"',
        "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
    ),
    "qwen-research": LicenceTerms(
        True,
        'for research only; a model trained on outputs says "Built with Qwen" or "Improved using Qwen"',
        "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
    ),
    "tongyi-qianwen": LicenceTerms(
        False,
        "outputs may not be used to improve another large language model than Tongyi Qianwen and its derivatives",
        "https://github.com/QwenLM/Qwen/blob/main/Tongyi%20Qianwen%20LICENSE%20AGREEMENT",
    ),
    "openai": LicenceTerms(False, _COMPETING, "https://openai.com/policies/row-terms-of-use/"),
    "anthropic": LicenceTerms(False, _COMPETING, "https://www.anthropic.com/legal/commercial-terms"),
    "gemini": LicenceTerms(False, _COMPETING, "https://ai.google.dev/gemini-api/terms"),
}  # fmt: skip


# Host of an endpoint -> the name in `TERMS` of its provider.
HOSTS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gemini",
}


def licence_of_endpoint(url: str) -> str | None:
    """The name in `TERMS` of the provider behind an endpoint; None if the provider is unknown."""
    return HOSTS.get(urlsplit(url).hostname or "")


def terms_of_licence(licence: str | None) -> LicenceTerms | None:
    """The terms of a licence in any spelling (`Apache 2.0`); None if they are unknown."""
    return _BY_NAME.get(_normalise_name(licence)) if licence else None


def allows_distillation(licence: str | None) -> bool | None:
    """Whether a licence allows training on the outputs of a model under it; None if that is unknown.

    In an expression, all licences of AND have to allow it, and one of OR.
    """
    if not licence:
        return None
    alternatives = _split(licence, "OR")
    if len(alternatives) > 1:
        answers = [allows_distillation(each) for each in alternatives]
        if True in answers:
            return True
        return None if None in answers else False
    names = licence_names(licence)
    if len(names) > 1:
        return all_allow(allows_distillation(name) for name in names)
    terms = terms_of_licence(_strip_brackets(licence))
    return terms.allows_distillation if terms else None


def is_allowed(licence: str | None, allowed: Collection[str]) -> bool | None:
    """Whether a licence is one of `allowed`, in any spelling; None if it is not stated.

    In an expression, all licences of AND have to be allowed, and one of OR.
    """
    if not licence:
        return None
    alternatives = _split(licence, "OR")
    if len(alternatives) > 1:
        return any(is_allowed(each, allowed) for each in alternatives)
    names = licence_names(licence)
    if len(names) > 1:
        return all(is_allowed(name, allowed) for name in names)
    return _normalise_name(_strip_brackets(licence)) in {_normalise_name(name) for name in allowed}


def all_allow(answers: Iterable[bool | None]) -> bool | None:
    """True if all answers are True, False if one is False, else None."""
    collected = list(answers)
    if False in collected:
        return False
    return None if None in collected else True


def licence_names(licence: str | None) -> list[str]:
    """The licences that apply together: the operands of AND in an expression; empty for None."""
    if not licence or len(_split(licence, "OR")) > 1:
        return [licence] if licence else []
    return [_strip_brackets(part) for part in _split(licence, "AND")]


def join_licences(licences: Iterable[str | None]) -> str | None:
    """The licences as one expression with AND, each once; None if there is none."""
    each = {_normalise_name(name): name for licence in licences for name in licence_names(licence)}
    if len(each) < 2:
        return next(iter(each.values()), None)
    return " AND ".join(f"({name})" if len(_split(name, "OR")) > 1 else name for name in each.values())


MAX_ANCESTORS = 1000  # guards against a circle
# The origins of a student that was made elsewhere.
UNKNOWN_TEACHER = "a teacher that is not recorded"
UNKNOWN_TEXT = "a text that is not recorded"


class LineageLicence(NamedTuple):
    """A licence along the lineage of a version: of a teacher, of data or of a base model."""

    role: Literal["teacher", "data", "base model"]
    version: str  # NAME/VERSION that was made from it
    origin: str  # NAME/VERSION of the teacher, digest of the data, or name of the base model
    licence: str | None  # None: not stated
    allows_distillation: bool | None  # whether a model may learn from it; None: unknown


def lineage_licences(store: Store, version: Version) -> list[LineageLicence]:
    """The licences of every teacher, base model and training text along a version's lineage, first ancestor first.

    A version that was distilled from a student is under the terms of that student's teacher too. Unknown lineage, of a
    deleted ancestor or of a student that was registered without its teacher, counts as a teacher without a licence.
    """
    by_version: list[list[LineageLicence]] = []
    while True:
        parent = _version_or_none(store, version.parent)
        if version.kind != "onnx" or parent is None:  # a variant has the licences of its student
            by_version.append(list(_own_licences(version, parent)))
        if parent is None or parent.ref == version.ref or len(by_version) > MAX_ANCESTORS:
            return [each for licences in reversed(by_version) for each in licences]
        version = parent


def fill_missing_fields(store: Store, version: Version, fields: Mapping[str, str | bool | None]) -> None:
    """Record fields of a version and its ONNX variants that were unknown when they were made.

    Fields that are recorded stay unchanged: to correct one, make the version again.
    """
    stated = {field: value for field, value in fields.items() if value is not None}
    if all(getattr(version, field) is not None for field in stated):
        return
    variants = [each for each in store.versions(version.name) if each.kind == "onnx" and each.parent == version.ref]
    for each in (version, *variants):
        for field, value in stated.items():
            if getattr(each, field) is None:
                store.client.set_model_version_tag(each.name, str(each.version), f"limbeck.{field}", str(value))


def _own_licences(version: Version, parent: Version | None) -> Iterator[LineageLicence]:
    """The licences that a version adds to those of its parent."""
    if version.kind != "teacher" and not (version.parent or version.teacher):
        yield LineageLicence("teacher", version.ref, UNKNOWN_TEACHER, None, None)
    if version.parent and version.kind != "teacher":  # a teacher's parent is the version that it is a copy of
        stated = version.teacher_licence or (parent.licence if parent else None)
        allowed = version.licence_allows_distillation
        yield LineageLicence(
            "teacher", version.ref, version.parent, stated, allows_distillation(stated) if allowed is None else allowed
        )
    if version.parent and parent is None:
        yield LineageLicence("teacher", version.ref, f"{version.parent}, which was deleted", None, None)
    if version.base_model:
        stated = version.base_model_licence
        yield LineageLicence("base model", version.ref, version.base_model, stated, allows_distillation(stated))
    if version.data_digest or version.kind != "teacher":
        origin, stated = version.data_digest or UNKNOWN_TEXT, version.data_licence
        yield LineageLicence("data", version.ref, origin, stated, allows_distillation(stated))


def _version_or_none(store: Store, ref: str | None) -> Version | None:
    try:
        return store.get(ref) if ref else None
    except BadInput:
        return None


def _split(expression: str, operator: str) -> list[str]:
    """The operands of an operator outside brackets. Does not handle nested brackets."""
    return re.split(rf"\s+{operator}\s+(?![^()]*\))", _strip_brackets(expression))


def _strip_brackets(expression: str) -> str:
    """The expression without brackets around the whole."""
    inner = re.fullmatch(r"\s*\(([^()]*)\)\s*", expression)
    return (inner[1] if inner else expression).strip()


def _normalise_name(licence: str) -> str:
    return re.sub(r"licen[cs]e|version|[\s_,-]+", "", licence.lower())


_BY_NAME = {_normalise_name(name): each for name, each in TERMS.items()}
