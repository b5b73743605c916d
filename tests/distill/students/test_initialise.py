"""Initial models of students, their size, and their vocabulary beside the teacher's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill.context import Setting
from limbeck.distill.data.blocks import train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.models import vocabularies
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.load import Source
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students import initialise
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model
from tests.distill.conftest import DISTILLED

Limbeck = Callable[..., Any]

INITIAL_MODELS = {
    "fresh": '[students.small.config]\nmodel_type = "gpt2"\nn_embd = 16\nn_layer = 1\nn_head = 2\n',
    "pretrained": '[students.small]\nmodel = "start"\n',
    "pruned": "[students.small.prune]\nnum_hidden_layers = 1\nintermediate_size = 40\n",
}


@pytest.fixture
def prepared(
    store: Store, write_recipe: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> Callable[[str], Setting]:
    """A recipe's setting; the student begins from one of INITIAL_MODELS, and the teacher's embeddings are padded."""
    make_model(tmp_path / "teacher", tokenizer_folder, "llama", vocab_size=352)
    make_model(tmp_path / "start", tokenizer_folder, "qwen2")

    def prepare_it(start: str) -> Setting:
        path = write_recipe("teacher", objectives=DISTILLED)
        text = path.read_text()
        begin, end = text.index("[students.small.config]"), text.index("[objectives")
        path.write_text(text[:begin] + start + text[end:])
        return prepare_setting(load.load_recipe(path), Source(path), store)

    return prepare_it


@pytest.mark.parametrize("start", INITIAL_MODELS)
def test_a_student_has_the_counted_parameters(prepared: Callable[[str], Setting], start: str, tmp_path: Path) -> None:
    setting = prepared(INITIAL_MODELS[start])
    [plan] = grid.plan_students(setting.recipe)
    initialise.check(setting, plan)
    expected = initialise.count_student_parameters(setting, "small")
    model = initialise.initialise_student(setting, plan)
    assert sum(p.numel() for p in model.parameters()) == expected
    compared = initialise.compare_with_teacher(setting, "small")
    assert compared
    assert compared.embedding_rows == (352, 352 if start == "pruned" else 300)
    assert compared.summary().startswith("equal: 300 tokens, embeddings padded to 352 and ")
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").num_parameters() == expected


def test_a_seed_decides_a_fresh_student(prepared: Callable[[str], Setting]) -> None:
    setting = prepared(INITIAL_MODELS["fresh"])
    [plan] = grid.plan_students(setting.recipe)
    first, again, other = (
        initialise.initialise_student(setting, plan.model_copy(update={"seed": seed})) for seed in (1, 1, 2)
    )
    table = [model.transformer.wte.weight for model in (first, again, other)]
    assert (table[0] == table[1]).all()
    assert not (table[0] == table[2]).all()


def test_a_base_model_whose_generation_config_cannot_be_saved(
    store: Store, limbeck: Limbeck, write_recipe: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    """As Llama 2's: a temperature without do_sample. The student also stops at the end token of its text."""
    start = make_model(tmp_path / "start", tokenizer_folder, "llama")
    (start / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "eos_token_id": 7}))
    path = write_recipe()
    text = path.read_text().replace("[tokenizer]\nvocab_size = 300\n", "")
    begin, end = text.index("[students.small.config]"), text.index("[objectives")
    path.write_text(text[:begin] + INITIAL_MODELS["pretrained"] + text[end:])
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 0, done.err
    [made] = json.loads(done.out)
    saved = json.loads(
        (store.artifacts.verified_folder(store.get(f"tiny/{made['version']}")) / "generation_config.json").read_text()
    )
    assert (saved["temperature"], saved["do_sample"], saved["eos_token_id"]) == (0.9, True, [7, 0])


def test_padded_vocabularies_are_distinguished_from_unequal_ones(tokenizer_folder: Path) -> None:
    shared = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = vocabularies.compare(shared, 152_064, shared, 151_936)
    assert (found.same, found.different_tokens, found.padding) == (True, 0, (151_764, 151_636))
    assert found.summary() == "equal: 300 tokens, embeddings padded to 152,064 and 151,936"
    assert vocabularies.compare(shared, 300, shared, 300).summary() == "equal: 300 tokens"
    other = train_tokenizer([Document("a", "other words, other tokens " * 9)], 270, 128)
    found = vocabularies.compare(shared, 300, other, 300)
    assert not found.same
    both = [tokenizer.get_vocab() for tokenizer in (shared, other)]
    assert found.different_tokens == len([t for t in {*both[0], *both[1]} if both[0].get(t) != both[1].get(t)]) > 0
    assert found.summary().startswith("unequal: 300 and 270 tokens, ")
    # The same tokens with two ids swapped.
    vocabulary = json.loads(shared.backend_tokenizer.to_str())
    table = vocabulary["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]
    swapped = AutoTokenizer.from_pretrained(tokenizer_folder)
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(vocabulary))
    assert vocabularies.compare(shared, 300, swapped, 300).different_tokens == 2


def test_special_tokens_and_bos_are_compared(tokenizer_folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    plain, with_bos = (AutoTokenizer.from_pretrained(tokenizer_folder) for _ in range(2))
    with_bos.bos_token = with_bos.eos_token = "a"
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A", special_tokens=[("a", with_bos.convert_tokens_to_ids("a"))]
    )
    summary = vocabularies.compare(plain, 300, with_bos, 300).summary()
    assert "bos_token: none and 'a'" in summary
    assert "eos_token: '<|endoftext|>' and 'a'" in summary
    assert "only the student's tokenizer adds BOS before a text" in summary
    assert "pad_token" not in summary
    assert vocabularies.compare(with_bos, 300, with_bos, 300).special == ()
