"""Makes lm-eval tasks from held-out text: YAML and JSON lines, for `limbeck eval` and for lm-eval itself."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.evals.tasks import minimal_pairs
from limbeck.registry.core.digest import file_digest, json_digest, text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write
from limbeck.registry.core.jsonl import read_rows

TASK_KINDS = ("bits_per_byte", "next_line", "minimal_pairs")
RECORD = "limbeck-tasks.json"
FORMAT = 1  # version of the tasks: raise it if the same corpus gives other tasks

ALL_BYTES = 100_000  # of bits_per_byte, if the number of documents is not given
DOCUMENT_BYTES = 1_400  # a longer document is truncated: many files are better evidence than long files
NEXT_LINES = 300
PAIRS = 100  # of each rule

CONTEXT_LINES, CONTEXT_CHARACTERS = 12, 240
CHOICES = 4
MIN_LINE_CHARACTERS = 8
LENGTH_RATIO_RANGE = (0.75, 1.33)  # length of a wrong line over that of the true one


class Document(NamedTuple):
    """One held-out text; standard errors are clustered by `path`."""

    path: str
    text: str


def make_tasks(
    corpus: Path,
    output_folder: Path,
    name: str,
    kinds: Sequence[str] = TASK_KINDS,
    *,
    documents: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Write the tasks `NAME_bits_per_byte`, `NAME_next_line`, `NAME_minimal_pairs` to `output_folder/NAME`.

    The same corpus gives the same tasks, and existing tasks are left unchanged. The folder is written whole or
    not at all. Its YAML has absolute paths of the data files, since lm-eval resolves relative paths from the current
    folder: if the folder was moved, its tasks are made again.

    Args:
        corpus: held-out text, one JSON object with "path" and "text" on each line.
        output_folder: the folder to give to `--include-path`.
        documents: at most this many for each task (for each rule of the minimal pairs); the default is small
            enough to score a small model in seconds.
        seed: decides which documents are chosen if there are more.

    Returns:
        The names to score. The minimal pairs are one group, with a task for each rule.

    Raises:
        BadInput: a corpus that cannot be read, or that has no text for a kind.
    """
    _check_arguments(name, kinds, documents)
    texts = _read_documents(corpus, seed)
    folder = Path(output_folder).resolve() / name
    tasks = [f"{name}_{kind}" for kind in TASK_KINDS if kind in kinds]
    record = {"tasks": tasks, "digest": json_digest([file_digest(corpus), documents, seed, str(folder), FORMAT])}
    known = folder / RECORD
    if known.exists() and json.loads(known.read_text()) == record:
        return tasks
    if folder.exists() and not known.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds files that are not tasks", fix="choose another folder with --output")
    with atomic_write(folder) as part:
        part.mkdir()
        for kind in TASK_KINDS:
            if kind in kinds:
                _WRITERS[kind](_Writer(part, folder, f"{name}_{kind}"), texts, documents, seed)
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return tasks


def _check_arguments(name: str, kinds: Sequence[str], documents: int | None) -> None:
    for kind in kinds:
        if kind not in TASK_KINDS:
            near = difflib.get_close_matches(kind, TASK_KINDS, n=1)
            raise BadInput(
                f"unknown kind of task {kind!r}" + (f"; did you mean {near[0]}?" if near else ""),
                fix=f"kinds: {', '.join(TASK_KINDS)}",
            )
    if not re.fullmatch(r"[\w.-]+", name):
        raise BadInput(f"{name!r} cannot be a task name", fix="use letters, digits, '_', '-' and '.'")
    if documents is not None and documents < 1:
        raise BadInput(f"documents is {documents}; it must be at least 1")


class _Writer(NamedTuple):
    """Writes tasks to `temporary_folder`, which is renamed to `folder` when all are written."""

    temporary_folder: Path
    folder: Path
    name: str

    def write_task(self, rows: Sequence[dict[str, Any]], name: str | None = None, **config: Any) -> None:
        """Write a task's documents and its YAML file."""
        name = name or self.name
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.temporary_folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        self.write_yaml(
            name,
            task=name,
            dataset_path="json",
            dataset_kwargs={"data_files": {"test": str(self.folder / f"{name}.jsonl")}},
            test_split="test",
            num_fewshot=0,
            **config,
            metadata={"version": FORMAT},
        )

    def write_yaml(self, file: str, **config: Any) -> None:
        """Write one YAML file."""
        import yaml

        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
        (self.temporary_folder / f"{file}.yaml").write_text(text, encoding="utf-8")


def _bits_per_byte(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    rows: list[dict[str, Any]] = []
    size = 0
    for document in texts:
        is_full = size >= ALL_BYTES if documents is None else len(rows) == documents
        if is_full:
            break
        text = _truncate_document(document.text)
        size += len(text.encode())
        rows.append({"path": document.path, "text": text})
    metrics = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (("bits_per_byte", "bits_per_byte"), ("byte_perplexity", "weighted_perplexity"))
    ]
    writer.write_task(
        rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=metrics
    )


def _truncate_document(text: str) -> str:
    """The first lines of a text that fit into DOCUMENT_BYTES; part of the first line if it alone is longer."""
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if size > DOCUMENT_BYTES:
            break
        lines.append(line)
    return "".join(lines) or text.encode()[:DOCUMENT_BYTES].decode(errors="ignore")


def _next_line(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    max_questions = documents or NEXT_LINES
    # At most twice an even share of each file, since some files have fewer questions. The first question of every
    # file comes first, then the second, and so on.
    share = math.ceil(2 * max_questions / len(texts))
    found = [row for document in texts for row in zip(range(share), _questions(document, seed), strict=False)]
    rows = [question for _, question in sorted(found, key=lambda row: row[0])[:max_questions]]
    if not rows:
        raise BadInput("next_line: no document has enough similar lines", fix="leave this kind out: --kind")
    writer.write_task(rows, **_choice_task(doc_to_text="context"))


def _questions(document: Document, seed: int) -> Iterator[dict[str, Any]]:
    """Questions about one document: which of four lines of equal indentation and similar length comes next?

    No choice occurs in the context: a repeated line would give it away.
    """
    lines = [line.rstrip() for line in document.text.splitlines()]
    indices = sorted(range(2, len(lines)), key=lambda index: text_digest(f"{seed}:{document.path}:{index}"))
    used: set[str] = set()
    for index in indices:
        true = lines[index]
        first = _context_start(lines, index)
        context = lines[first:index]
        in_context = {line.strip() for line in context}
        others = {
            line
            for line in lines[:first] + lines[index + 1 :]
            if _is_plausible_line(line, true) and line != true and line.strip() not in in_context
        }
        is_repeated = true.strip() in in_context | used
        if len(true.strip()) < MIN_LINE_CHARACTERS or is_repeated or not any(in_context) or len(others) < CHOICES - 1:
            continue
        used.add(true.strip())
        order = {line: text_digest(f"{seed}:{document.path}:{index}:{line}") for line in (true, *others)}
        wrong = sorted(others, key=order.__getitem__)[: CHOICES - 1]
        choices = sorted([true, *wrong], key=lambda line: text_digest(order[line]))
        yield {
            "path": document.path,
            "context": "\n".join(context),
            "choices": ["\n" + line for line in choices],
            "label": choices.index(true),
        }


def _context_start(lines: Sequence[str], index: int) -> int:
    """The first line of the context before a line: at most CONTEXT_LINES, until CONTEXT_CHARACTERS are reached."""
    first = index
    while first > max(0, index - CONTEXT_LINES) and len("\n".join(lines[first - 1 : index])) <= CONTEXT_CHARACTERS:
        first -= 1
    return first


def _is_plausible_line(line: str, true: str) -> bool:
    """Whether a line could replace the true one: equal indentation and similar length."""
    indents = [len(text) - len(text.lstrip()) for text in (line, true)]
    return (
        indents[0] == indents[1]
        and LENGTH_RATIO_RANGE[0] <= len(line.strip()) / max(1, len(true.strip())) <= LENGTH_RATIO_RANGE[1]
    )


def _minimal_pairs(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    max_pairs = documents or PAIRS
    read = ((document.path, minimal_pairs.read_source(document.text)) for document in texts)
    sources = [(path, source) for path, source in read if source]
    if not sources:
        raise BadInput("minimal_pairs: no document of the corpus is Python source", fix="leave this kind out: --kind")
    share = math.ceil(2 * max_pairs / len(sources))
    tasks = []
    for rule in minimal_pairs.RULES:
        found = [
            (number, path, pair)
            for path, source in sources
            for number, pair in enumerate(minimal_pairs.make_pairs(source, rule, share, f"{seed}:{rule}:{path}"))
        ]
        rows = []
        for _, path, pair in sorted(found, key=lambda row: row[0])[:max_pairs]:
            choices = sorted(pair, key=lambda text: text_digest(f"{seed}:{text}"))
            rows.append({"path": path, "choices": choices, "label": choices.index(pair.good)})
        if rows:
            tasks.append(f"{writer.name}_{rule}")
            writer.write_task(rows, tasks[-1], **_choice_task(doc_to_text=""))
    if not tasks:
        raise BadInput("minimal_pairs: no document has a short enough statement", fix="leave this kind out: --kind")
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    writer.write_yaml(writer.name, group=writer.name, task=tasks, aggregate_metric_list=aggregate)


def _choice_task(doc_to_text: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": doc_to_text,
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


_WRITERS = {"bits_per_byte": _bits_per_byte, "next_line": _next_line, "minimal_pairs": _minimal_pairs}


def _read_documents(corpus: Path, seed: int) -> list[Document]:
    """The documents of a corpus that are not blank, sorted by a hash of their paths."""
    documents = [document for document in map(Document._make, read_rows(corpus)) if document.text.strip()]
    if not documents:
        raise BadInput(f"{corpus} has no text")
    return sorted(documents, key=lambda document: text_digest(f"{seed}:{document.path}"))
