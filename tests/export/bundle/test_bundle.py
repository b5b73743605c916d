"""Bundles: an artifact, verified, and all that serves it, in a folder that needs nothing else of Limbeck."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from limbeck.export.bundle.layout import is_bundle, verified_artifact_folder
from limbeck.export.bundle.write import write_bundle
from limbeck.export.bundle.vendor import pinned_requirements, source_files
from limbeck.export.commands.locate import find_artifact
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from tests.export.export_helpers import Exported


@pytest.fixture(scope="module")
def made(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that nobody writes to."""
    bundle = tmp_path_factory.mktemp("made") / "bundle"
    assert write_bundle(llama.fp32, bundle, manifest_fields={"model": "coder/3"}) == llama.variants[0].digest
    return bundle


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "bundle")


def test_its_artifact_is_the_one_that_was_deployed(llama: Exported, made: Path, runtime: Runtime) -> None:
    assert is_bundle(made)
    assert not is_bundle(llama.fp32)
    found = find_artifact(str(made))
    assert (found.name, found.engine, found.path) == ("coder/3", "onnxruntime", made / "model")
    assert (
        resolve_model(str(made)).digest == llama.variants[0].digest
    )  # what is scored, or whose tokenizer is asked for
    bundled = Runtime.load(found.path, expected_digest=llama.variants[0].digest)
    ours, theirs = (r.generate(["def "], max_new_tokens=8)[0].token_ids for r in (bundled, runtime))
    assert ours == theirs
    manifest = read_manifest(found.path)
    assert manifest["model"] == "coder/3"
    assert manifest["parity"] == read_manifest(llama.fp32)["parity"]
    assert llama.variants[0].digest in (made / "README.md").read_text()


def test_a_newer_bundle_takes_the_place_of_an_older_one(llama: Exported, bundle: Path) -> None:
    digest = write_bundle(llama.int8, bundle)
    assert Runtime.load(verified_artifact_folder(bundle)).digest == digest == llama.variants[1].digest
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_model_card_is_checked_as_the_rest(llama: Exported, bundle: Path) -> None:
    digest = write_bundle(llama.fp32, bundle, model_card="---\nlicense: mit\n---\n\n# à\n")
    assert Runtime.load(verified_artifact_folder(bundle)).digest == digest == llama.variants[0].digest
    card = bundle / "model" / "README.md"
    assert card.read_text(encoding="utf-8").endswith("# à\n")
    card.write_text("# another\n")
    with pytest.raises(DamagedArtifact, match=r"model/README\.md has sha256"):
        verified_artifact_folder(bundle)


def test_an_older_bundle_stays_where_the_newer_cannot_be_made(llama: Exported, bundle: Path) -> None:
    before = (bundle / "limbeck.json").read_bytes()
    artifact = shutil.copytree(llama.int8, bundle.parent / "artifact")
    with open(artifact / "config.json", "a") as file:
        file.write(" ")
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        write_bundle(artifact, bundle)
    with pytest.raises(DamagedArtifact, match="expected 0000"):
        write_bundle(llama.int8, bundle, digest="0" * 64)
    assert (bundle / "limbeck.json").read_bytes() == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["artifact", "bundle"]


def test_only_an_onnx_artifact_goes_only_where_nothing_else_is(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not an ONNX artifact"):
        write_bundle(llama.torch, tmp_path / "bundle")
    (tmp_path / "home.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not a bundle"):
        write_bundle(llama.fp32, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["home.txt"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("start", "start has sha256"),
        ("lib/limbeck/export/server/app.py", "lib/limbeck/export/server/app.py has sha256"),
        ("requirements.txt", "requirements.txt has sha256"),
        ("model/limbeck.json", "model/limbeck.json has sha256"),
        ("lib/limbeck/export/new.py", "lib/limbeck/export/new.py was added"),
    ],
)
def test_a_changed_file_is_found(bundle: Path, name: str, what: str) -> None:
    with open(bundle / name, "a") as file:
        file.write("\n")
    with pytest.raises(DamagedArtifact, match=re.escape(what)):
        find_artifact(str(bundle))


def test_a_missing_file_is_found(bundle: Path) -> None:
    (bundle / "model/limbeck.json").unlink()
    (bundle / "health").unlink()
    with pytest.raises(DamagedArtifact, match=r"health is missing; model/limbeck.json is missing"):
        find_artifact(str(bundle))


def test_a_changed_weight_is_found_when_it_is_loaded(bundle: Path) -> None:
    (bundle / "lib/__pycache__").mkdir()
    (bundle / "lib/__pycache__/limbeck.pyc").write_bytes(b"")  # no harm
    weights = bundle / "model/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedArtifact, match=r"model\.onnx has sha256"):
        Runtime.load(find_artifact(str(bundle)).path)


def test_every_file_is_listed_and_nothing_of_this_machine(made: Path, tmp_path: Path, llama: Exported) -> None:
    inner = {f"model/{name}" for name in read_manifest(made / "model")["files"]}
    listed = inner | set(read_manifest(made)["files"]) | {"limbeck.json"}
    assert listed == {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    write_bundle(llama.fp32, tmp_path / "again", manifest_fields={"model": "coder/3"})
    assert (tmp_path / "again/limbeck.json").read_bytes() == (made / "limbeck.json").read_bytes()


def test_it_has_the_code_and_the_packages_of_a_server_and_no_more(made: Path) -> None:
    names = {path.relative_to(made / "lib").as_posix() for path in (made / "lib").rglob("*") if path.is_file()}
    assert names == set(source_files())
    run = ("__main__.py", "cli.py", "export/server/app.py", "export/runtime/batch.py", "registry/core/digest.py")
    assert {f"limbeck/{name}" for name in run} <= names
    assert {f"limbeck/{name}__init__.py" for name in ("", "export/", "export/server/", "registry/")} <= names
    absent = (
        "export/artifact",
        "export/graph",
        "export/commands/export.py",
        "export/bundle/write.py",
        "registry/mlflow",
    )
    assert not [name for name in names if name.startswith(tuple(f"limbeck/{path}" for path in absent))]
    assert not names & {"limbeck/registry/catalog/model_ref.py", "limbeck/registry/records.py"}
    pins = dict(pin.split("==") for pin in pinned_requirements())
    # What is imported, and what that needs in turn.
    assert {"onnxruntime", "numpy", "tokenizers", "uvicorn", "h11", "markupsafe", "pydantic-core"} <= set(pins)
    assert not set(pins) & {"torch", "transformers", "mlflow", "onnx", "optimum", "datasets", "scipy", "rich"}
    import onnxruntime

    assert pins["onnxruntime"] == onnxruntime.__version__
    lines = (made / "requirements.txt").read_text().splitlines()
    assert lines[1:] == pinned_requirements()


def test_what_runs_it_names_only_what_is_there(made: Path) -> None:
    unit = (made / "limbeck.service").read_text()
    assert "Description=coder/3, served by Limbeck" in unit
    assert "/bin/kill -HUP $MAINPID" in unit
    container = (made / "Containerfile").read_text()
    for name in re.findall(r'"\./(\w+)"|COPY (\w\S*)', container) + re.findall(r"bundle/()(\w+)", unit):
        assert (made / "".join(name)).is_file(), name
    python = json.loads((made / "limbeck.json").read_text())["python"]
    assert f"python:{python}-slim" in container
    for program in ("start", "health"):
        assert (made / program).stat().st_mode & 0o111 == 0o111
