"""A student of half the teacher's depth is distilled for some steps, and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from limbeck.registry.mlflow.store import Store
from tests.conftest import Result

RECIPE = """
name = "half"
licence = "CC-BY-SA-3.0"
[data]
path = "{text}"
licence = "CC-BY-SA-3.0"
heldout = 0.1
max_length = 128
max_tokens = 8_192
[teacher]
model = "{teacher}"
licence = "Apache-2.0"
[students.half.prune]
num_hidden_layers = 15
[objectives.distilled]
divergence = "forward_kl"
labels = 0.2
[training]
max_steps = 8
per_device_train_batch_size = 4
learning_rate = 5e-4
logging_steps = 4
eval_steps = 4
"""


def test_a_student_of_half_the_depth(
    smollm2: Path, paragraphs: list[str], store: Store, limbeck: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"path": str(number), "text": text}) for number, text in enumerate(paragraphs[:120]))
    )
    (tmp_path / "recipe.toml").write_text(RECIPE.format(text=tmp_path / "text.jsonl", teacher=smollm2))
    done = limbeck("distill", tmp_path / "recipe.toml", "--format", "json")
    assert done.code == 0, done.err
    version = next(version for version in store.versions("half") if version.kind == "student")
    assert version.run_id is not None
    losses = [
        metric.value for metric in store.client.get_metric_history(version.run_id, "heldout_sample_bits_per_byte")
    ]
    assert losses[-1] < losses[0]
    exported = limbeck("export", version.ref, "--precision", "fp32", "--format", "json")
    assert exported.code == 0, exported.err
    [variant] = json.loads(exported.out)
    assert variant["parity"]["passed"]
