"""The hidden-state loss equals the formulas written out, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.losses.distiller import Distiller
from limbeck.distill.losses.hidden_states import layer_map
from limbeck.distill.recipe.schema import Layers, Objective
from limbeck.distill.run.distill import distill
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A Llama of half the usual width, and three layers."""
    folder = tmp_path_factory.mktemp("narrow")
    return make_model(folder, tokenizer_folder, "llama", hidden_size=16, num_hidden_layers=3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A Llama of the usual width, and six layers."""
    return make_model(tmp_path_factory.mktemp("deep"), tokenizer_folder, "llama", seed=1, num_hidden_layers=6)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 5:9] = -100
    return {"input_ids": ids, "labels": labels}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def states(model: PreTrainedModel, batch: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """A layer's output at the tokens whose next token is a target: (N, d)."""
    outputs: list[torch.Tensor] = []
    # transformers counts the final norm as part of the last layer.
    module = model.model.norm if layer == len(model.model.layers) else model.model.layers[layer - 1]
    hook = module.register_forward_hook(
        lambda _, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=batch["input_ids"])
    hook.remove()
    return torch.stack([outputs[0][row, place] for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist()])


def distance(kind: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The distance at each token: (N, d), (N, d) -> (N,)."""
    if kind == "mse":
        return ((a - b) ** 2).sum(-1) / a.shape[-1]
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("student_name", ["narrow", "tiny_llama"])
def test_the_loss_and_its_gradients(
    kind: str, student_name: str, deep: Path, batch: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    """Two matched layers and the label loss; with projections only if the widths differ."""
    student, teacher = load(request.getfixturevalue(student_name)), load(deep)
    chosen = {1: 2, 2: 6}
    objective = Objective(labels=1.0, layers=Layers(loss=kind, weight=3.0, map=chosen))
    distiller = Distiller(student, objective, teacher, 300)
    projections = distiller.layers.projections
    assert (projections is not None) == (student_name == "narrow")
    targets = int((batch["labels"][:, 1:] != -100).sum())
    losses = distiller(batch, targets)
    losses.loss.backward()
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()

    labels = torch.where(batch["labels"] == -100, -100, batch["labels"])
    wanted = student(input_ids=batch["input_ids"], labels=labels).loss
    for student_layer, teacher_layer in chosen.items():
        own = states(student, batch, student_layer)
        if projections is not None:
            own = own @ projections[str(student_layer)].weight.T
        target = states(teacher, batch, teacher_layer).detach()
        wanted = wanted + 3.0 * distance(kind, own, target).mean() / len(chosen)
    wanted.backward()
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-5, atol=1e-5)
    expected = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected)
    assert sum(name.startswith("layers.") for name in expected) == (2 if projections is not None else 0)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_training_on_layers_and_a_divergence_lowers_the_loss(
    narrow: Path, deep: Path, batch: dict[str, torch.Tensor]
) -> None:
    objective = Objective(divergence="forward_kl", layers=Layers(loss="mse"))
    distiller = Distiller(load(narrow), objective, load(deep), 300)
    assert distiller.layers.map == {1: 2, 2: 4, 3: 6}
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(distiller(batch, 26).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] > 0


def test_projections_do_not_depend_on_the_seed_and_are_not_part_of_the_student(narrow: Path, deep: Path) -> None:
    objective, weights = Objective(labels=1.0, layers=Layers()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = load(narrow)
        distiller = Distiller(student, objective, load(deep), 300)
        weights.append(distiller.state_dict()["layers.projections.2.weight"])
        assert not any("projections" in name for name in student.state_dict())
    assert weights[0].shape == (32, 16)
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0].T @ weights[0], torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [(6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}), (3, 4, {1: 1, 2: 3, 3: 4}), (3, 2, {1: 1, 2: 1, 3: 2})],
)
def test_without_a_map_layers_are_spread_evenly(student: int, teacher: int, wanted: dict[int, int]) -> None:
    assert layer_map(Layers(), student, teacher) == wanted


@pytest.mark.parametrize(("chosen", "role"), [({0: 1}, "student"), ({4: 1}, "student"), ({1: 7}, "teacher")])
def test_layers_that_do_not_exist_are_bad_input(chosen: dict[int, int], role: str) -> None:
    with pytest.raises(BadInput, match=f"{role} has layers 1 to"):
        layer_map(Layers(map=chosen), 3, 6)


def test_layers_without_an_online_teacher_are_bad_input(narrow: Path) -> None:
    with pytest.raises(BadInput, match="a cache stores none"):
        Distiller(load(narrow), Objective(labels=1.0, layers=Layers()), None, 300)


def test_a_recipe_with_layers(deep: Path, write_recipe: Callable[..., Path], store: Store, tmp_path: Path) -> None:
    """Trains with gradient checkpointing; the saved student has no projections."""
    student = 'model_type = "llama"\nhidden_size = 16\nintermediate_size = 32\nnum_hidden_layers = 2\n'
    recipe = write_recipe(
        deep,
        student + "num_attention_heads = 2",
        '[objectives.both]\ndivergence = "forward_kl"\n[objectives.both.layers]\nloss = "mse"\nmap = {1 = 3, 2 = 6}\n',
        'activation_checkpointing = true\n[cache]\nform = "online"\n',
    )
    [made] = distill(recipe, [], store, output_folder=tmp_path / "student")
    assert made.trained
    with safe_open(tmp_path / "student" / "model.safetensors", framework="numpy") as file:
        assert not [name for name in file.keys() if not name.startswith(("model.", "lm_head."))]  # noqa: SIM118 (no dict)
