"""What the steps of a distillation run share: recipe, text, tokenizer, blocks and teacher."""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import licence, loading
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Recipe
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.provenance import licences
from limbeck.registry.records import Version

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


EMPTY_CORPUS = corpus.Corpus(Path(), Path(), "", 0, 0, 0, 0)  # not written yet


class Setting(NamedTuple):
    """What every student of a recipe shares."""

    recipe: Recipe
    source: Source
    corpus: corpus.Corpus
    train: Blocks
    heldout: Blocks
    tokenizer: PreTrainedTokenizerBase
    teacher: ResolvedModel | None
    teacher_version: Version | None
    base_models: dict[str, ResolvedModel]  # of the students that begin pretrained
    generated: GenerationStats | None = None  # of a text that the teacher wrote
    # Label of the teacher, or of what a student begins as -> licences of its parts (distill.students.licences)
    inherited_terms: dict[str, tuple[licences.LineageLicence, ...]] = {}

    @property
    def teacher_licence_allows(self) -> bool | None:
        """Whether the teacher's own licence lets a student learn from its outputs; None: not known, or no teacher."""
        asked = self.recipe.teacher
        if asked is None or asked.licence_allows_distillation is not None:
            return asked.licence_allows_distillation if asked else None
        return licences.allows_distillation(self.teacher_licence)

    @property
    def teacher_licence(self) -> str | None:
        """As the recipe says, else as the provider's terms, the registry or its card do; None: not stated."""
        asked, teacher = self.recipe.teacher, self.teacher
        if asked is None or asked.licence or teacher is None:
            return asked.licence if asked else None
        return licences.licence_of_endpoint(asked.model) or licence.licence_of_model(teacher)

    @property
    def vocab_size(self) -> int:
        return loading.vocabulary_size(self.tokenizer)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a recipe's teacher. Raises BadInput where there is none."""
        return loading.load_tokenizer(*self._teacher_files())

    def teacher_config(self) -> PretrainedConfig:
        """Of a recipe's local teacher."""
        return loading.load_config(*self._teacher_files())

    def teacher_model(self) -> PreTrainedModel:
        """A recipe's local teacher, in float32."""
        return loading.load_model(*self._teacher_files())

    def _teacher_files(self) -> tuple[Path, bool]:
        assert self.teacher is not None
        assert self.recipe.teacher is not None
        return self.teacher.path, self.recipe.teacher.trust_remote_code


@contextmanager
def errors_at(source: Source, *key: str) -> Iterator[None]:
    """An error within is told with the place in the recipe that it comes from."""
    try:
        yield
    except LimbeckError as error:
        error.message = f"{source.locate_key(*key)}: {error.message}"
        raise


def count_parameters(folder: Path) -> int:
    """The parameters in a folder of safetensors, from their headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (no dict)
    return total


@functools.cache
def code_version() -> str:
    """Limbeck's version, and the commit it runs from where it runs from a clone."""
    root = Path(__file__).parents[3]
    version = f"limbeck {installed('limbeck')}"
    if not (root / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}+g{commit.stdout.strip()}" if commit.returncode == 0 else version


class GenerationStats(NamedTuple):
    """What came of it. Seconds, tokens and dollars are those of all answers, whichever run had them made."""

    prompts: int
    too_long: int  # prompts left out: with max_new_tokens they pass the teacher's context
    answers: int
    kept_answers: int
    dropped: dict[str, int]  # by filter
    tokens: int  # of all answers
    seconds: float  # a local teacher took
    input_tokens: int  # of a teacher behind an endpoint
    output_tokens: int
    usd: float
    new_answers: int  # answers that this run had made

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        facts = {f"generate.{name}": float(value) for name, value in self._asdict().items() if name != "dropped"}
        return facts | {f"generate.dropped.{name}": float(count) for name, count in self.dropped.items()}
