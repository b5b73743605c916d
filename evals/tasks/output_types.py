"""What differs by lm-eval's output type: one class for each type, found with `output_type_of(task)`.

To support a new output type, write its class and add it to `OUTPUT_TYPES`. Nothing else compares output types.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.evals.tasks.chance import Chance, best_constant_answer, free_bits_per_byte
from limbeck.evals.tasks.faults import Kind
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from limbeck.evals.tasks.metrics import Metric

MAX_LABEL_CHARACTERS = 60  # in a message
MAX_TEXT_CHARACTERS = 1000  # of a target and of a response in a documents table
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # metrics that take one choice as the answer


class Rendered(NamedTuple):
    """A document as its task renders it.

    Attributes:
        choices: None if the type has none.
        label: what names the right choice: its number, its text, or several of them.
    """

    prompt: Any
    target: Any
    choices: Any = None
    label: Any = None

    @property
    def has_no_prompt(self) -> bool:
        """Whether the prompt is a text, and blank."""
        return isinstance(self.prompt, str) and not self.prompt.strip()


class OutputType:
    """The base of all output types. Its methods give what holds for a type without special treatment."""

    uses_gen_kwargs = False  # the task has generation settings, which --gen-kwargs overrides

    def render(self, task: Task, doc: Any) -> Rendered:
        """A document's parts. Raises whatever the task's templates and functions raise."""
        return Rendered(task.doc_to_text(doc), task.doc_to_target(doc))

    def faults(self, rendered: Rendered, *, has_prompts: bool) -> Iterator[tuple[Kind, str]]:
        """(kind, detail) of what is wrong with a document.

        Args:
            has_prompts: whether some of the task's documents have a prompt; else all that differs is the rest.
        """
        if rendered.has_no_prompt and has_prompts:
            yield "empty document", "its prompt is empty"

    def document_texts(self, task: Task, doc: Any) -> list[str]:
        """A document's prompt without few-shot examples, and its right answer: what contamination looks for."""
        return _texts_of_parts([task.doc_to_text(doc), task.doc_to_target(doc)], choices=[])

    def chance(self, task: Task, metric: Metric) -> Chance:
        """The metric's value that costs nothing: the better of what is found and `metadata: {chance: ...}`."""
        found, known = self._chance(task, metric), (getattr(task.config, "metadata", None) or {}).get("chance")
        if known is None:
            return found
        value = found.value
        if value is not None and (value >= known) == bool(task.higher_is_better().get(metric.name, True)):
            return found
        return Chance(float(known), "the task's metadata")

    def _chance(self, task: Task, metric: Metric) -> Chance:
        if metric.name != "bits_per_byte":
            return Chance(None)
        return free_bits_per_byte([self.document_texts(task, doc)[-1] for doc in _docs(task)])

    def answer_columns(self, task: Task, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
        """The target, response and choice columns of one document (see `documents.DOCUMENT_SCHEMA`).

        Args:
            sample: as lm-eval logs it. A column that is left out is null.
        """
        return {}


class Loglikelihood(OutputType):
    """`loglikelihood`: the log-probability of one continuation."""

    def faults(self, rendered: Rendered, *, has_prompts: bool) -> Iterator[tuple[Kind, str]]:
        yield from super().faults(rendered, has_prompts=has_prompts)
        if rendered.target in ("", None):
            yield "empty document", "its target is empty"

    def answer_columns(self, task: Task, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
        return {"target": _truncated_text(sample["target"])}


class LoglikelihoodRolling(OutputType):
    """`loglikelihood_rolling`: the log-probability of a whole text. The target is the text; there is no prompt."""

    def faults(self, rendered: Rendered, *, has_prompts: bool) -> Iterator[tuple[Kind, str]]:
        if not rendered.target:
            yield "empty text", "it counts with weight 0"

    def document_texts(self, task: Task, doc: Any) -> list[str]:
        return _texts_of_parts([task.doc_to_target(doc)], choices=[])


class MultipleChoice(OutputType):
    """`multiple_choice`: the log-probability of each choice; the likeliest is the answer."""

    def render(self, task: Task, doc: Any) -> Rendered:
        prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
        # If each choice makes a prompt of its own, doc_to_text gives the number of the right choice.
        return Rendered(prompt, target, task.doc_to_choice(doc), prompt if task.multiple_input else target)

    def faults(self, rendered: Rendered, *, has_prompts: bool) -> Iterator[tuple[Kind, str]]:
        yield from super().faults(rendered, has_prompts=has_prompts)
        choices = rendered.choices
        if not isinstance(choices, list | tuple) or not choices:
            yield "empty choice", "it has no choices"
            return
        empty = [str(number) for number, choice in enumerate(choices) if choice in ("", None)]
        if empty:
            yield "empty choice", f"choice {', '.join(empty)} of its choices 0 to {len(choices) - 1} is empty"
        several = isinstance(rendered.label, list | tuple)
        labels = rendered.label if several else [rendered.label]
        if not labels:
            yield "label out of range", "it has no label"
        for label in labels:
            named = isinstance(label, str) and not several and label in choices
            if not named and not (isinstance(label, int | float) and label in range(len(choices))):
                known = f"its choices 0 to {len(choices) - 1}"
                yield "label out of range", f"label {str(label)[:MAX_LABEL_CHARACTERS]!r} is none of {known}"

    def document_texts(self, task: Task, doc: Any) -> list[str]:
        return _texts_of_parts([task.doc_to_text(doc), task.doc_to_target(doc)], task.doc_to_choice(doc))

    def _chance(self, task: Task, metric: Metric) -> Chance:
        if metric.name not in ACCURACIES:
            return super()._chance(task, metric)
        return Chance(float(np.mean([1 / len(task.doc_to_choice(doc)) for doc in _docs(task)])), "any of the choices")

    def answer_columns(self, task: Task, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
        """The response is the choice that lm-eval's `process_results` takes for this metric."""
        doc = sample["doc"]
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        logprobs = [float(logprob) for logprob, _ in sample["filtered_resps"]]
        conditional, unconditional = logprobs[: len(choices)], logprobs[len(choices) :]
        ranked = np.array(conditional)
        if metric == "acc_norm":
            ranked = ranked / [len(choice) for choice in choices]
        elif metric == "acc_bytes":
            ranked = ranked / [len(choice.encode()) for choice in choices]
        elif metric == "acc_mutual_info":
            ranked = ranked - unconditional
        # If each choice makes a prompt of its own, doc_to_text gives the number of the right choice.
        target = task.doc_to_text(doc) if task.multiple_input else sample["target"]
        return {
            "target": _truncated_text(_resolve_choices(target, choices)),
            "response": _truncated_text(choices[int(ranked.argmax())]),
            "choice_logprobs": conditional,
            "choice_lengths": [len(choice) for choice in choices],
        }


class GenerateUntil(OutputType):
    """`generate_until`: text generated up to a stop string."""

    uses_gen_kwargs = True

    def faults(self, rendered: Rendered, *, has_prompts: bool) -> Iterator[tuple[Kind, str]]:
        return super().faults(rendered, has_prompts=True)

    def _chance(self, task: Task, metric: Metric) -> Chance:
        if metric.name != "bits_per_byte" and task.higher_is_better().get(metric.name, True):
            return best_constant_answer(task, metric, _docs(task))
        return super()._chance(task, metric)

    def answer_columns(self, task: Task, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
        return {"target": _truncated_text(sample["target"]), "response": _truncated_text(sample["resps"][0][0])}


OUTPUT_TYPES: dict[str, OutputType] = {
    "loglikelihood": Loglikelihood(),
    "loglikelihood_rolling": LoglikelihoodRolling(),
    "multiple_choice": MultipleChoice(),
    "generate_until": GenerateUntil(),
}


def output_type_of(task: Task) -> OutputType:
    """The output type of a task. Raises BadInput, naming the task, if Limbeck does not know the type."""
    name = task.OUTPUT_TYPE
    if name in OUTPUT_TYPES:
        return OUTPUT_TYPES[name]
    near = difflib.get_close_matches(str(name), OUTPUT_TYPES, n=1)
    raise BadInput(
        f"task {task.task_name} has the unknown output type {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
        fix=f"known output types: {', '.join(OUTPUT_TYPES)}",
    )


def _docs(task: Task) -> list[Any]:
    """The documents that are scored."""
    return [*{instance.doc_id: instance.doc for instance in task.instances}.values()]


def _texts_of_parts(parts: list[Any], choices: list[Any]) -> list[str]:
    """Prompts and targets as texts; one part may hold several."""
    return [str(text) for part in parts for text in _resolve_choices(part, choices)]


def _resolve_choices(part: Any, choices: list[Any]) -> list[Any]:
    """A prompt or target as a list of texts; the number of a choice becomes that choice."""
    several = part if isinstance(part, list | tuple) else [part]
    return [choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one for one in several]


def _truncated_text(value: Any) -> str:
    """One text or several, joined by " | "."""
    several = value if isinstance(value, list | tuple) else [value]
    return " | ".join(map(str, several))[:MAX_TEXT_CHARACTERS]
