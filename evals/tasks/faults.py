"""What is wrong with tasks, found before a model is loaded: one `Fault` for each place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from limbeck.registry.core.errors import BadInput
from limbeck.registry.records.base import Record

MAX_LISTED = 20  # faults of one kind and task in a message; the others are counted

Kind = Literal[
    "unreadable file",
    "empty file",
    "two files with one name",
    "code of a task",
    "task that cannot be loaded",
    "task that cannot be scored",
    "no documents",
    "document that does not fit the task",
    "empty document",
    "empty text",
    "empty choice",
    "label out of range",
    "document among its own few-shot examples",
    "tokenizer larger than the embedding",
]


class Fault(Record):
    """One fault, and where it is.

    Attributes:
        kind: of all faults with the same fix.
        detail: what is wrong there, in a few words.
        task: its name; None if the fault is no task's.
        file: the task's YAML file or data file, as the task names it; None if it is no file on this machine.
        row: "line 3" or "row 3", counted from 1 without a header; None if it is unknown, or the whole file.
        document: the number that lm-eval and `--samples` give the document, from 0.
    """

    kind: Kind
    detail: str
    task: str | None = None
    file: str | None = None
    row: str | None = None
    document: int | None = None

    @property
    def stops(self) -> bool:
        """Whether the task cannot be scored: bits per byte of all texts do not change with an empty one."""
        return self.kind != "empty text"

    @property
    def place(self) -> str:
        """The file, row and document."""
        parts = [part for part in (self.file, self.row) if part]
        if self.document is not None:
            parts.append(f"document {self.document}")
        return ", ".join(parts)


FIXES: dict[str, str] = {
    "unreadable file": "mend the file, or save it as UTF-8",
    "empty file": "write the documents into it",
    "two files with one name": "rename one of the tasks, or leave one of the files out of the folder",
    "code of a task": "read the code; if you trust it, give --allow-task-code",
    "task that cannot be loaded": "",
    "task that cannot be scored": "",
    "document among its own few-shot examples": (
        "give the task `fewshot_split`, another split or the same as its test_split: lm-eval then leaves a document "
        "out of its own examples"
    ),
    "tokenizer larger than the embedding": "give the model its own tokenizer, or enlarge its embedding",
}
DEFAULT_FIX = "mend the task or its data, or leave the documents out with --samples"


class FaultyTasks(BadInput):
    """Tasks that cannot be scored as they are (exit code 2). Names all faults at once.

    Attributes:
        faults: all of them.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        count = len(self.faults)
        head = "the tasks have a fault" if count == 1 else f"the tasks have {count:,} faults"
        super().__init__("\n".join([f"{head}:", *fault_lines(self.faults)]))


def fault_lines(faults: Sequence[Fault]) -> Iterator[str]:
    """A message's lines: by kind and task, at most MAX_LISTED of each, and the fix of each kind."""

    def key(fault: Fault) -> tuple[str, str]:
        return fault.kind, fault.task or ""

    for (kind, task), group in groupby(sorted(faults, key=key), key):
        several = list(group)
        yield f"  {kind}" + (f", task {task}" if task else "") + (f": {len(several):,}" if several[1:] else "")
        for fault in several[:MAX_LISTED]:
            yield "    " + ": ".join(part for part in (fault.place, fault.detail) if part)
        if several[MAX_LISTED:]:
            yield f"    and {len(several) - MAX_LISTED:,} more"
        if fix := FIXES.get(kind, DEFAULT_FIX):
            yield f"    fix: {fix}"
