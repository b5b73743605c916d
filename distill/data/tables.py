"""Tables (JSON lines, JSON, parquet, CSV, hub datasets): their rows as documents.

For another file format, or a compressed one: `table_format` in `recipe/schema.py` says which files are tables, and
`load_rows` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.distill.data.document import Document, conversation_document
from limbeck.distill.recipe.schema import Data, table_format
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

ROLES = ("system", "user", "assistant")
MESSAGE_FIX = 'a message is {"role": "system", "user" or "assistant", "content": "..."}'


def load_rows(data: Data, path: str) -> Any:
    """The rows of a table file or of a Hugging Face dataset, as a `datasets.Dataset`."""
    import datasets

    datasets.disable_progress_bars()
    loader = table_format(path)
    try:
        if loader:
            return datasets.load_dataset(loader, data_files=path, split="train", cache_dir=str(home() / "datasets"))
        return datasets.load_dataset(path, data.dataset_name, split=data.split)
    except Exception as error:  # datasets raises many kinds; each means: this data cannot be read
        raise BadInput(f"data.path {path!r} cannot be loaded: {error}") from error


def row_path(row: Mapping[str, Any], path: str, number: int) -> str:
    """The name that identifies a row: its own `path`, else its file's name and its number."""
    return str(row.get("path") or f"{Path(path).name}:{number:07d}")


def table_documents(data: Data, path: str) -> Iterator[tuple[Document, Mapping[str, Any]]]:
    """The document of each row that has text, with the row itself.

    Raises BadInput for a missing column, and for an unusable row, with its number.
    """
    rows = load_rows(data, path)
    _check_columns(data, path, rows.column_names)
    for number, row in enumerate(rows):
        try:
            document = document_of_row(data, row, row_path(row, path, number))
        except BadInput as error:
            error.message = f"{path}, row {number + 1}: {error.message}"
            raise
        if document:
            yield document, row


def _check_columns(data: Data, path: str, columns: list[str]) -> None:
    """Raise BadInput if the table lacks a column that the recipe reads."""
    keys = ["messages_column", "prompt_column", "completion_column"]
    if not (data.messages_column or data.prompt_column):
        keys.append("text_column")
    for key in keys:
        column = getattr(data, key)
        if column and column not in columns:
            raise BadInput(f"{path} has no column {column!r}", fix=f"set data.{key} to one of: {', '.join(columns)}")


def document_of_row(data: Data, row: Mapping[str, Any], path: str) -> Document | None:
    """A row as a text, a prompt with its completion, or a conversation; None if its text is missing.

    Raises BadInput for a missing prompt, completion or message.
    """
    if data.messages_column:
        return conversation_document(path, _checked_messages(row, data.messages_column))
    if data.prompt_column:
        prompt = _text_in_column(row, data.prompt_column)
        completion = _text_in_column(row, data.completion_column) if data.completion_column else ""
        return Document(path, prompt + completion, prompt=prompt)
    text = row[data.text_column]
    return Document(path, text) if isinstance(text, str) else None


def _text_in_column(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    problem = "not text" if isinstance(value, (dict, list)) else "empty"
    raise BadInput(f"{column} is {problem}", fix="leave the row out")


def _checked_messages(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    """The messages of a row, with role and content only. Raises BadInput for an unusable one."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{column} has no messages", fix=MESSAGE_FIX)
    for number, message in enumerate(messages, 1):
        usable = isinstance(message, dict) and message.get("role") in ROLES
        if not usable or not isinstance(message.get("content"), str):
            raise BadInput(f"{column}, message {number} cannot be used: {str(message)[:80]}", fix=MESSAGE_FIX)
    return [{"role": message["role"], "content": message["content"]} for message in messages]
