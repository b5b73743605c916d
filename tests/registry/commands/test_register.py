"""`limbeck register`, and the way from a checkpoint that was made elsewhere to a served alias."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from limbeck.export.commands.locate import find_onnx_artifact
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result

TASK = """
task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" one", " two"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
POLICY = "[quality.margin]\nacc = 0.9\n[lineage]\nrequire_distillation_licence = true\n"


def test_what_register_prints(store: Store, limbeck: Callable[..., Result], tiny_llama: Path) -> None:
    done = limbeck("register", tiny_llama, "--name", "made")
    assert (done.code, "made/1" in done.out, "new" in done.out) == (0, True, True)
    assert "its teacher is unknown" in done.err
    assert "state it: limbeck register FOLDER --name made --licence SPDX" in done.err
    again = limbeck("register", tiny_llama, "--name", "made", "--licence", "mit", "--format", "json")
    assert json.loads(again.out) == store.get("made/1").model_dump(mode="json") | {"new": False}
    assert "licence is unknown" not in again.err
    assert limbeck("register", tiny_llama, "--name", "made", "--licence", "gpl-3.0").code == 2
    assert limbeck("register", tiny_llama, "--name", "no name").code == 2


def test_from_a_checkpoint_to_a_served_alias(
    store: Store, limbeck: Callable[..., Result], tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{number} drops of spirit", "label": number % 2} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pairs.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    (tmp_path / "policy.toml").write_text(POLICY)
    commands = (
        ("register", tiny_llama, "--name", "alone"),
        ("register", tiny_qwen2, "--name", "made", "--kind", "teacher", "--licence", "mit"),
        ("register", tiny_llama, "--name", "made", "--parent", "made/1"),
        ("export", "made/2", "--precision", "fp32"),
        ("eval", "made/3", "--tasks", "pairs", "--include-path", tmp_path, "--against", "made/1", "--no-cost"),
        ("promote", "made"),
    )
    for command in commands:
        done = limbeck(*command)
        assert done.code == 0, done.err
    assert find_onnx_artifact("made@production").name == "made/3"
    # The same model without its teacher: it can be scored against any, and its licence is not settled.
    limbeck("export", "alone/1", "--precision", "fp32")
    limbeck("eval", "alone/2", "--tasks", "pairs", "--include-path", tmp_path, "--against", "made/1", "--no-cost")
    refused = limbeck("promote", "alone")
    assert refused.code == 1
    assert "lineage.require_distillation_licence (inconclusive): the teacher of alone/1 is not recorded" in refused.err
    (tmp_path / "policy.toml").write_text(POLICY.split("[lineage]")[0])
    assert limbeck("promote", "alone").code == 0
    assert find_onnx_artifact("alone@production").name == "alone/2"
