"""What is wrong with the documents of a loaded task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from limbeck.evals.tasks.data_files import data_files_of, rows_of
from limbeck.evals.tasks.faults import Fault, Kind
from limbeck.evals.tasks.output_types import Rendered, output_type_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task

MAX_TEXT = 120  # characters of a document in a message
Found = tuple[Kind, str]  # kind and detail


class CheckedDocuments:
    """The documents of a task that will be scored, rendered once.

    Args:
        documents: number -> document.
    """

    def __init__(self, task: Task, documents: Mapping[int, Any]) -> None:
        self.task = task
        self._type = output_type_of(task)
        self.documents = documents
        self._rendered: dict[int, Rendered] = {}
        self._unfit: dict[int, list[Found]] = {}
        for number, doc in documents.items():
            try:
                self._rendered[number] = self._type.render(task, doc)
            except Exception as error:  # a template, or a function of the task, may raise any type
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._unfit[number] = [("document that does not fit the task", text[:MAX_TEXT])]

    def faults(self) -> list[Fault]:
        """Documents that cannot be rendered, are empty, or have a label that is no choice."""
        if not self.documents:
            detail = "its split has none, or its process_docs leaves none"
            return [Fault(kind="no documents", detail=detail, task=str(self.task.task_name))]
        found = dict(self._unfit)
        has_prompts = any(not rendered.has_no_prompt for rendered in self._rendered.values())
        for number, rendered in self._rendered.items():
            if several := list(self._type.faults(rendered, has_prompts=has_prompts)):
                found[number] = several
        return _located(self.task, found)

    def example_faults(self, examples: Sequence[Sequence[Any]]) -> list[Fault]:
        """A fault for each document that is among its own few-shot examples, or that one of them repeats.

        Args:
            examples: of each document, in order; empty if the task has no examples.
        """
        kind: Kind = "document among its own few-shot examples"
        found: dict[int, list[Found]] = {}
        known: dict[int, Rendered | None] = {}
        for (number, doc), several in zip(self.documents.items(), examples, strict=False):
            own = self._rendered.get(number)
            for example in several:
                if id(example) not in known:
                    known[id(example)] = self._render_example(example)
                if example == doc or (own and own == known[id(example)]):
                    found[number] = [(kind, "the prompt has its answer")]
        return _located(self.task, found)

    def _render_example(self, example: Any) -> Rendered | None:
        try:
            return self._type.render(self.task, example)
        except Exception:  # an example may lack fields that only a scored document needs
            return None


@contextmanager
def recorded_examples(task: Task) -> Iterator[list[Sequence[Any]]]:
    """The few-shot examples that a task draws within it: one list for each document, in order."""
    drawn: list[Sequence[Any]] = []
    sampler = getattr(task, "sampler", None)
    if sampler is None:
        yield drawn
        return
    sample: Callable[..., Sequence[Any]] = sampler.sample

    def recording(*args: Any, **kwargs: Any) -> Sequence[Any]:
        drawn.append(sample(*args, **kwargs))
        return drawn[-1]

    sampler.sample = recording
    try:
        yield drawn
    finally:
        del sampler.sample


def _located(task: Task, found: Mapping[int, Iterable[Found]]) -> list[Fault]:
    """Faults with file and row, if the documents are the rows of files on this machine."""
    config = task.config
    rows: dict[int, tuple[str | None, str | None]] = {}
    if found and getattr(config, "process_docs", None) is None:
        split = getattr(config, "test_split", None) or getattr(config, "validation_split", None)
        paths = data_files_of(config).get(str(split), [])
        rows = dict(islice(enumerate(rows_of(paths)), max(found) + 1))
        if len(paths) == 1:
            rows = {number: rows.get(number, (str(paths[0]), None)) for number in found}
    faults = []
    for number, several in sorted(found.items()):
        file, row = rows.get(number, (None, None))
        for kind, detail in several:
            faults.append(
                Fault(kind=kind, detail=detail, task=str(task.task_name), file=file, row=row, document=number)
            )
    return faults
