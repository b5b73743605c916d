"""What all steps of a distillation run share: recipe, text, tokenizer, blocks and teacher."""

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
from limbeck.distill.models import loading
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Recipe
from limbeck.registry.catalog import model_licence
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.provenance import licences
from limbeck.registry.records import Version

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


EMPTY_CORPUS = corpus.Corpus(Path(), Path(), "", 0, 0, 0, 0)  # before the text is written


class Setting(NamedTuple):
    """What all students of a recipe share."""

    recipe: Recipe
    source: Source
    corpus: corpus.Corpus
    train: Blocks
    heldout: Blocks
    tokenizer: PreTrainedTokenizerBase
    teacher: ResolvedModel | None
    teacher_version: Version | None
    base_models: dict[str, ResolvedModel]  # of the students that start pretrained, by student
    generated: GenerationStats | None = None  # with [generate]
    # Label of the teacher or of a base model -> licences of its lineage (distill.students.licences)
    inherited_terms: dict[str, tuple[licences.LineageLicence, ...]] = {}

    @property
    def teacher_licence_allows(self) -> bool | None:
        """Whether the teacher's own licence lets a student learn from its outputs; None if unknown or no teacher."""
        spec = self.recipe.teacher
        if spec is None:
            return None
        if spec.licence_allows_distillation is not None:
            return spec.licence_allows_distillation
        return licences.allows_distillation(self.teacher_licence)

    @property
    def teacher_licence(self) -> str | None:
        """From the recipe, else the provider's terms, the registry or the model card; None if nobody states it."""
        spec = self.recipe.teacher
        if spec is None:
            return None
        if spec.licence or self.teacher is None:
            return spec.licence
        return licences.licence_of_endpoint(spec.model) or model_licence.licence_of_model(self.teacher)

    @property
    def vocab_size(self) -> int:
        return loading.vocabulary_size(self.tokenizer)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the recipe's teacher. Raises BadInput if it has none."""
        return load_tokenizer(*self._teacher_files())

    def teacher_config(self) -> PretrainedConfig:
        """The config of the recipe's local teacher."""
        return load_config(*self._teacher_files())

    def teacher_model(self) -> PreTrainedModel:
        """The recipe's local teacher, in float32."""
        return load_model(*self._teacher_files())

    def _teacher_files(self) -> tuple[Path, bool]:
        assert self.teacher is not None
        assert self.recipe.teacher is not None
        return self.teacher.path, self.recipe.teacher.trust_remote_code


@contextmanager
def errors_at(source: Source, *key: str) -> Iterator[None]:
    """Add the place of a recipe key to the message of any error raised inside."""
    try:
        yield
    except LimbeckError as error:
        error.message = f"{source.locate_key(*key)}: {error.message}"
        raise


def count_parameters(folder: Path) -> int:
    """Number of parameters in the safetensors files of a folder. Reads only their headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (no dict)
    return total


@functools.cache
def code_version() -> str:
    """Limbeck's version, with the git commit if it runs from a clone."""
    root = Path(__file__).parents[2]
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
    """Statistics of a text that the teacher wrote.

    Seconds, tokens and dollars are of all answers, also of those that an earlier run generated.
    """

    prompts: int
    too_long: int  # prompts that do not fit the teacher's context together with max_new_tokens
    answers: int
    kept_answers: int
    dropped: dict[str, int]  # by filter
    tokens: int  # of all answers
    seconds: float  # of a local teacher
    input_tokens: int  # of an endpoint
    output_tokens: int
    usd: float
    new_answers: int  # generated in this run

    def metrics(self) -> dict[str, float]:
        """The statistics as MLflow metrics."""
        counts = {f"generate.{name}": float(value) for name, value in self._asdict().items() if name != "dropped"}
        return counts | {f"generate.dropped.{name}": float(count) for name, count in self.dropped.items()}
