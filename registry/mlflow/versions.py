"""A version as MLflow keeps it, a model version with tags `limbeck.*`, and as the record `Version`."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Version

TAG_PREFIX = "limbeck."
MODEL_ID_TAG = TAG_PREFIX + "model_id"  # the LoggedModel that holds a version's files and metrics
NOT_IN_TAGS = {"name", "version", "source", "created", "run_id", "aliases"}  # MLflow has them itself
TAG_FIELDS = sorted(set(Version.model_fields) - NOT_IN_TAGS)
DIGEST = re.compile(r"[0-9a-f]{64}")


def version_tags(version: Version) -> dict[str, str]:
    """The tags that hold the fields of a version; fields that are None have none."""
    values = {field: getattr(version, field) for field in TAG_FIELDS}
    return {TAG_PREFIX + field: str(value) for field, value in values.items() if value is not None}


def to_version(found: Any) -> Version:
    """The record of a model version of MLflow, or of a `limbeck.registry.mlflow.listing.ListedVersion`.

    Raises BadInput if Limbeck did not register it, or if somebody changed its tags.
    """
    ref = f"{found.name}/{found.version}"
    fields = {field: found.tags[TAG_PREFIX + field] for field in TAG_FIELDS if TAG_PREFIX + field in found.tags}
    if "digest" not in fields or "kind" not in fields:
        raise BadInput(
            f"{ref} was not registered by Limbeck: it has no digest", fix="register its files with Limbeck first"
        )
    if not DIGEST.fullmatch(fields["digest"]):  # folders are named after it
        raise BadInput(f"{ref} is unreadable: its digest is {fields['digest']!r:.60}")
    try:
        mlflow_fields = {
            "name": found.name,
            "version": int(found.version),
            "source": found.source,
            "created": datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
            "run_id": found.run_id or None,
            "aliases": tuple(sorted(found.aliases or ())),
        }
        return Version.model_validate(fields | mlflow_fields)
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise BadInput(
            f"{ref} is unreadable: {_describe_error(error)}",
            fix="undo the change in MLflow, or delete the version there and register it again",
        ) from None


def to_version_or_error(found: Any) -> Version | BadInput:
    """As `to_version`; the error is returned."""
    try:
        return to_version(found)
    except BadInput as error:
        return error


def _describe_error(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"its date is invalid ({error})"
    problems = error.errors(include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}, not {each['input']!r:.60}" for each in problems
    )
