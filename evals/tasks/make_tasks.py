"""lm-eval tasks from held-out text: plain YAML beside JSON lines, for `limbeck eval` and for lm-eval itself."""

from __future__ import annotations

import difflib
import json
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
FORMAT = 1  # raised when the same corpus gives other tasks

ALL_BYTES = 100_000  # of bits_per_byte, where the number of documents is not given
DOCUMENT_BYTES = 1_400  # a longer document is cut: many files tell more than long ones
NEXT_LINES = 300
PAIRS = 100  # for each rule

CONTEXT_LINES, CONTEXT_CHARACTERS = 12, 240
CHOICES = 4
SHORTEST_LINE = 8  # characters; a shorter one says too little
LENGTH_RATIO_RANGE = (0.75, 1.33)  # lengths of the wrong lines over that of the true one


class Document(NamedTuple):
    """One held-out text; `path` is what the standard errors are clustered by."""

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
    """Write the tasks `NAME_bits_per_byte`, `NAME_next_line`, `NAME_minimal_pairs` to the folder `to/NAME`.

    The same corpus gives the same tasks; tasks that are there already are left as they are. The folder is
    written whole or not at all. Its YAML names the data files by absolute path, since lm-eval looks for
    relative ones in the current folder: a folder that was moved is made anew.

    Args:
        corpus: held-out text, a JSON object with "path" and "text" a line. to: for `--include-path`.
        documents: of each task (of each rule of the minimal pairs), at most; the default is chosen so that a
            small model is scored in seconds.
        seed: decides what is taken where there is more.

    Returns:
        The names to score; the minimal pairs are one, a group of a task for each rule.

    Raises:
        BadInput: a corpus that cannot be read, or a kind that it does not serve.
    """
    for kind in kinds:
        if kind not in TASK_KINDS:
            near = difflib.get_close_matches(kind, TASK_KINDS, n=1)
            raise BadInput(
                f"unknown kind of task {kind!r}" + (f"; did you mean {near[0]}?" if near else ""),
                fix=f"kinds: {', '.join(TASK_KINDS)}",
            )
    if not re.fullmatch(r"[\w.-]+", name):
        raise BadInput(f"{name!r} is no name for tasks", fix="use letters, digits, '_', '-' and '.'")
    if documents is not None and documents < 1:
        raise BadInput(f"documents is {documents}; it must be at least 1")
    texts = _read_documents(corpus, seed)
    folder = Path(output_folder).resolve() / name
    tasks = [f"{name}_{kind}" for kind in TASK_KINDS if kind in kinds]
    record = {"tasks": tasks, "digest": json_digest([file_digest(corpus), documents, seed, str(folder), FORMAT])}
    known = folder / RECORD
    if known.exists() and json.loads(known.read_text()) == record:
        return tasks
    if folder.exists() and not known.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds something else", fix="choose another folder with --to")
    with atomic_write(folder) as part:
        part.mkdir()
        for kind in TASK_KINDS:
            if kind in kinds:
                _WRITERS[kind](_Writer(part, folder, f"{name}_{kind}"), texts, documents, seed)
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return tasks


class _Writer(NamedTuple):
    """Writes tasks to `part`, which will be called `folder`."""

    temporary_folder: Path
    folder: Path
    name: str

    def write_task(self, rows: Sequence[dict[str, Any]], name: str | None = None, **config: Any) -> None:
        """A task's documents and its YAML."""
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
        """A YAML file."""
        import yaml

        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
        (self.temporary_folder / f"{file}.yaml").write_text(text, encoding="utf-8")


def _bits_per_byte(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    rows: list[dict[str, Any]] = []
    size = 0
    for document in texts:
        if size >= ALL_BYTES if documents is None else len(rows) == documents:
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
    """The lines of a text that fit into DOCUMENT_BYTES; part of the first where that alone does not."""
    taken, size = [], 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if size > DOCUMENT_BYTES:
            break
        taken.append(line)
    return "".join(taken) or text.encode()[:DOCUMENT_BYTES].decode(errors="ignore")


def _next_line(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    most = documents or NEXT_LINES
    # Twice an even share of each file, since some files give fewer; then the first of every file, and so on.
    share = -(-2 * most // len(texts))
    found = [row for document in texts for row in zip(range(share), _questions(document, seed), strict=False)]
    rows = [question for _, question in sorted(found, key=lambda row: row[0])[:most]]
    if not rows:
        raise BadInput(
            "next_line: no document has enough lines that look alike", fix="leave this kind of task out: --kind"
        )
    writer.write_task(rows, **_choice_task(doc_to_text="context"))


def _questions(document: Document, seed: int) -> Iterator[dict[str, Any]]:
    """Places in a document where a line is to be told from three others of the same indentation and length.

    No choice stands in the context, so that none is given away by being repeated.
    """
    lines = [line.rstrip() for line in document.text.splitlines()]
    places = sorted(range(2, len(lines)), key=lambda place: text_digest(f"{seed}:{document.path}:{place}"))
    asked: set[str] = set()
    for place in places:
        true = lines[place]
        first = place
        while first > max(0, place - CONTEXT_LINES) and len("\n".join(lines[first - 1 : place])) <= CONTEXT_CHARACTERS:
            first -= 1
        context = lines[first:place]
        seen = {line.strip() for line in context}
        others = {
            line
            for line in lines[:first] + lines[place + 1 :]
            if _is_plausible_line(line, true) and line != true and line.strip() not in seen
        }
        fits = len(true.strip()) >= SHORTEST_LINE and true.strip() not in seen | asked and any(seen)
        if not fits or len(others) < CHOICES - 1:
            continue
        asked.add(true.strip())

        def order(line: str, place: int = place) -> str:
            return text_digest(f"{seed}:{document.path}:{place}:{line}")

        wrong = sorted(others, key=order)[: CHOICES - 1]
        choices = sorted([true, *wrong], key=lambda line: text_digest(order(line)))
        yield {
            "path": document.path,
            "context": "\n".join(context),
            "choices": ["\n" + line for line in choices],
            "label": choices.index(true),
        }


def _is_plausible_line(line: str, true: str) -> bool:
    """Whether a line could stand in for the true one: as far indented, and about as long."""
    indents = [len(text) - len(text.lstrip()) for text in (line, true)]
    return (
        indents[0] == indents[1]
        and LENGTH_RATIO_RANGE[0] <= len(line.strip()) / max(1, len(true.strip())) <= LENGTH_RATIO_RANGE[1]
    )


def _minimal_pairs(writer: _Writer, texts: Sequence[Document], documents: int | None, seed: int) -> None:
    most = documents or PAIRS
    sources = [document for document in texts if _is_python(document.text)]
    if not sources:
        raise BadInput(
            "minimal_pairs: no document of the corpus is Python source", fix="leave this kind of task out: --kind"
        )
    share = -(-2 * most // len(sources))
    tasks = []
    for rule in minimal_pairs.RULES:
        found = [
            (number, document.path, pair)
            for document in sources
            for number, pair in enumerate(
                minimal_pairs.make_pairs(document.text, rule, share, f"{seed}:{rule}:{document.path}")
            )
        ]
        rows = []
        for _, path, pair in sorted(found, key=lambda row: row[0])[:most]:
            choices = sorted(pair, key=lambda text: text_digest(f"{seed}:{text}"))
            rows.append({"path": path, "choices": choices, "label": choices.index(pair.good)})
        if rows:
            tasks.append(f"{writer.name}_{rule}")
            writer.write_task(rows, tasks[-1], **_choice_task(doc_to_text=""))
    if not tasks:
        raise BadInput("minimal_pairs: no document has a statement short enough", fix="leave it out: --kind")
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


def _is_python(text: str) -> bool:
    try:
        return bool(minimal_pairs.parse(text).body)
    except SyntaxError:
        return False


def _read_documents(corpus: Path, seed: int) -> list[Document]:
    """The documents of a corpus that are not blank, in the order of a hash of their paths."""
    documents = [document for document in map(Document._make, read_rows(corpus)) if document.text.strip()]
    if not documents:
        raise BadInput(f"{corpus} has no text")
    return sorted(documents, key=lambda document: text_digest(f"{seed}:{document.path}"))
