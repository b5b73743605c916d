"""SBOMs: their contents, that the same records give the same SBOM, and that changes are detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from limbeck.registry.core import signing
from limbeck.registry.core.digest import file_digests, text_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import CostLimits
from limbeck.registry.provenance import attestation, cyclonedx
from limbeck.registry.provenance.sbom import Sbom, read_sbom, verify_sbom
from limbeck.registry.records import NewVersion, Version
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public key that is configured for signing, and trusted as ada's."""
    public = signing.create_key(tmp_path / "ada.pem")
    (tmp_path / "trusted").write_text(f"{public} ada\n")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ada.pem"))
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    return public


@pytest.fixture
def made(store: Store, make_folder: Callable[..., Path]) -> Version:
    """A variant of a student that began pretrained and learnt from a teacher, with all that is recorded of that."""
    teacher = store.register(NewVersion(name="still", kind="teacher", licence="apache-2.0"), make_folder("teacher"))
    code = "limbeck 0.1.0+gcf305ea"
    origin: dict[str, Any] = {
        "teacher": teacher.ref, "recipe": "small", "recipe_digest": "d" * 64, "data_digest": "e" * 64,
        "licence": "MIT", "teacher_licence": "apache-2.0", "data_licence": "PSF-2.0 AND my-own", "code_version": code,
        "code_licence": "Apache-2.0", "base_model": "owner/base", "base_model_digest": "f" * 64,
        "base_model_licence": "llama3.1", "licence_allows_distillation": True,
    }  # fmt: skip
    with store.runs.start("still", params={"data.path": "texts.jsonl", "data.source": None}) as run:
        run.set_tags({cyclonedx.MADE_WITH: json.dumps({"torch": "2.13.0+cpu"})})
    parent = store.register(
        NewVersion(name="still", kind="student", parent=teacher.ref, run_id=run.id, **origin), make_folder("student")
    )
    return store.register(
        NewVersion(
            name="still",
            kind="onnx",
            engine="onnxruntime",
            precision="int8-weight",
            parent=parent.ref,
            run_id=run.id,
            **origin,
        ),
        make_folder("int8-weight", onnx=True),
    )


def test_an_sbom_has_all_parts_of_a_version(store: Store, made: Version) -> None:
    document = attestation.sbom_json(store, made)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
    main = document["metadata"]["component"]
    assert (main["type"], main["name"], main["version"]) == ("machine-learning-model", "still", "3")
    files = {each["name"]: each["hashes"][0]["content"] for each in main["components"]}
    assert files == file_digests(store.artifacts.verified_folder(made))
    parts = {each["bom-ref"]: each for each in document["components"]}
    licences = {
        ref: [one["license"].get("id") or one["license"]["name"] for one in each.get("licenses", [])]
        for ref, each in parts.items()
    }
    base, data, recipe, code = "base:owner/base", f"data:{'e' * 64}", f"recipe:{'d' * 64}", f"code:{made.code_version}"
    torch = "pkg:pypi/torch@2.13.0%2Bcpu"
    assert licences == {
        "model:still/2": ["MIT"],
        "model:still/1": ["Apache-2.0"],
        base: ["llama3.1"],
        data: ["PSF-2.0", "my-own"],
        recipe: [],
        code: ["Apache-2.0"],
        torch: [],
    }
    digests = {ref: each["hashes"][0]["content"] for ref, each in parts.items() if "hashes" in each}
    teacher, student = store.get("still/1"), store.get("still/2")
    assert digests == {
        "model:still/2": student.digest,
        "model:still/1": teacher.digest,
        base: "f" * 64,
        data: "e" * 64,
        recipe: "d" * 64,
    }
    assert parts[data]["name"] == "texts.jsonl"
    assert parts[code]["pedigree"] == {"commits": [{"uid": "cf305ea"}]}
    uses = {each["ref"]: set(each.get("dependsOn", [])) for each in document["dependencies"]}
    assert uses["model:still/3"] == {"model:still/2"}
    assert uses["model:still/2"] == {"model:still/1", base, data, recipe, code, torch}
    assert not uses["model:still/1"]


def test_a_clone_with_changes_has_no_commit(store: Store, make_folder: Callable[..., Path]) -> None:
    version = store.register(
        NewVersion(name="a", kind="teacher", code_version="limbeck 0.1.0+gcf305ea-dirty"), make_folder("a")
    )
    [code] = attestation.sbom_json(store, version)["components"]
    assert (code["version"], "pedigree" in code) == ("0.1.0+gcf305ea-dirty", False)


def test_a_deleted_ancestor_is_named(store: Store, made: Version) -> None:
    store.client.delete_model_version("still", "2")
    document = attestation.sbom_json(store, made)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
    parts = {each["bom-ref"]: each for each in document["components"]}
    assert "deleted from the registry" in parts["model:still/2"]["description"]
    assert f"data:{'e' * 64}" in parts  # the variant knows its text all the same


def test_an_sbom_has_scores_and_verdict(scored: Still) -> None:
    version = scored.variants["int8-weight"]
    unjudged = attestation.sbom_json(scored.store, version)
    promote(scored.store, version.ref, "production", POLICY)
    document = attestation.sbom_json(scored.store, version)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
    metrics = document["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    bits = next(each for each in metrics if each.get("slice") == "bits")
    assert (bits["type"], bits["value"]) == ("acc", "0.5")
    assert bits["confidenceInterval"] == {"lowerBound": "0.4804", "upperBound": "0.5196"}
    retention = next(each for each in metrics if each["type"] == "retention against still/1")
    assert (retention["value"], retention["confidenceInterval"]) == (
        "0.97",
        {"lowerBound": "0.95", "upperBound": "0.99"},
    )
    properties = {each["name"]: each["value"] for each in document["metadata"]["component"]["properties"]}
    [verdict] = scored.store.findings.verdicts(version)
    [card] = scored.store.findings.scorecards(version)
    assert properties["limbeck:verdict"] == verdict.digest()
    assert properties["limbeck:scorecard"] == card.digest()
    assert (properties["limbeck:outcome"], properties["limbeck:tasks"]) == ("pass", "tasks")
    assert unjudged["serialNumber"] != document["serialNumber"]


def test_the_same_records_give_the_same_sbom(scored: Still) -> None:
    store, version = scored.store, scored.variants["int8-weight"]
    first = attestation.attest(store, version)
    assert attestation.attest(Store(), version) == first
    found = attestation.find_sbom(store, version)
    assert found is not None
    assert (found.digest, found.signatures, found.artifact_digest()) == (first, (), version.digest)
    scored.score(version, usd=3.0, harness="lm-eval 1")  # another state
    second = attestation.attest(store, version)
    assert second != first
    older = attestation.find_sbom(store, version, first)
    assert older == found
    assert attestation.find_sbom(store, version, "0" * 64) is None


def test_a_promotion_stores_an_sbom_that_the_ledger_names(scored: Still) -> None:
    store = scored.store
    done = promote(store, "still", "production", POLICY)
    assert done.entry is not None
    found = attestation.sbom_of_ref(store, "still@production")
    assert found is not None
    assert done.entry.sbom == found.digest == text_digest(found.text)
    assert found.artifact_digest() == done.chosen.digest
    other = POLICY.model_copy(update={"cost": CostLimits(max_cost_ratio=0.6)})
    staged = promote(store, done.chosen.ref, "staging", other)  # another verdict
    assert staged.entry is not None
    assert staged.entry.sbom != done.entry.sbom
    assert attestation.sbom_of_ref(store, "still@production") == found
    tag = f"limbeck.sbom.{str(done.entry.sbom)[:16]}"
    store.client.delete_model_version_tag("still", str(done.chosen.version), tag)
    with pytest.raises(DamagedArtifact, match="which is gone"):
        attestation.sbom_of_ref(store, "still@production")


def test_a_changed_sbom_is_detected(scored: Still) -> None:
    store, version = scored.store, scored.variants["int8-weight"]
    digest = attestation.attest(store, version)
    found = attestation.find_sbom(store, version)
    assert found is not None

    def tamper(text: str) -> None:
        store.client.set_model_version_tag("still", str(version.version), f"limbeck.sbom.{digest[:16]}", text)

    for text in (found.text.replace('"0.97"', '"1.97"'), "{}", "[]", "no JSON"):
        assert text != found.text
        tamper(text)
        with pytest.raises(DamagedArtifact, match="the SBOM of still/4"):
            attestation.find_sbom(store, version)
    tamper(found.text)
    assert attestation.find_sbom(store, version) == found


def test_an_sbom_is_signed_with_the_configured_key(
    scored: Still, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = scored.store, scored.variants["int8-weight"]
    monkeypatch.delenv(signing.KEY_FILE_VARIABLE)
    digest = attestation.attest(store, version)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ada.pem"))
    assert attestation.attest(store, version) == digest  # the same SBOM, signed now
    found = attestation.find_sbom(store, version)
    assert found is not None
    assert [each.key for each in found.signatures] == [key]
    assert verify_sbom(found, version.digest, version.ref) == "ada"
    ben = signing.create_key(tmp_path / "ben.pem")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ben.pem"))
    signed = attestation.sign_sbom(store, version, found)
    assert {each.key for each in signed.signatures} == {key, ben}
    stored = attestation.find_sbom(store, version)
    assert stored is not None
    assert set(stored.signatures) == set(signed.signatures)
    assert verify_sbom(stored, version.digest, version.ref) == "ada"


def test_a_key_that_cannot_be_used_stores_nothing(
    scored: Still, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "nowhere.pem"))
    with pytest.raises(BadInput, match=r"the signing key .* cannot be read"):
        promote(scored.store, "still", "production", POLICY)
    assert attestation.find_sbom(scored.store, scored.variants["int8-weight"]) is None
    assert log.read_entries(scored.store, "still") == []
    assert scored.store.aliases("still") == {}


@pytest.fixture
def signed(scored: Still, key: str) -> tuple[Sbom, Version]:
    """A signed SBOM, and its version."""
    version = scored.variants["int8-weight"]
    attestation.attest(scored.store, version)
    found = attestation.find_sbom(scored.store, version)
    assert found is not None
    return found, version


def test_sboms_that_are_not_trusted(scored: Still, signed: tuple[Sbom, Version], tmp_path: Path) -> None:
    sbom, version = signed
    other = scored.variants["fp32"]

    def refused(kind: type[Exception], message: str, given: Sbom | None, digest: str = version.digest) -> None:
        with pytest.raises(kind, match=message):
            verify_sbom(given, digest, version.ref)

    refused(BadInput, "still/4 has no SBOM, and LIMBECK_TRUSTED_KEYS requires", None)
    refused(BadInput, "is not signed", sbom._replace(signatures=()))
    refused(DamagedArtifact, "is of other files", sbom, other.digest)
    changed = sbom._replace(text=sbom.text.replace('"0.97"', '"1.97"'))
    refused(DamagedArtifact, "the signature of ada does not match", changed)
    refused(DamagedArtifact, "cannot be read: no files are listed", Sbom("{}"))
    refused(DamagedArtifact, "cannot be read", Sbom("no JSON"))
    eve = signing.create_key(tmp_path / "eve.pem")
    theirs = sbom.signatures[0]._replace(key=eve)
    refused(BadInput, "signed, but not with a key that LIMBECK_TRUSTED_KEYS lists", sbom._replace(signatures=(theirs,)))
    assert verify_sbom(sbom._replace(signatures=(theirs, *sbom.signatures)), version.digest, "it") == "ada"


def test_without_trusted_keys_an_sbom_still_has_to_be_of_the_artifact(
    scored: Still, signed: tuple[Sbom, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    sbom, version = signed
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE)
    assert verify_sbom(sbom, version.digest, "it") is None
    assert verify_sbom(None, version.digest, "it") is None
    with pytest.raises(DamagedArtifact, match="is of other files"):
        verify_sbom(sbom, scored.variants["fp32"].digest, "it")


def test_the_command_prints_stores_and_verifies(
    scored: Still,
    limbeck: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, version = scored.store, scored.variants["int8-weight"]
    shown = limbeck("models", "sbom", "still/4")
    assert json.loads(shown.out)["metadata"]["component"]["version"] == "4"
    assert "neither stored nor signed" in shown.err
    assert attestation.find_sbom(store, version) is None
    none = limbeck("models", "sbom", "still/4", "--verify")
    assert (none.code, "limbeck models sbom still/4 --attest" in none.err) == (2, True)
    promote(store, "still/4", "production", POLICY)
    assert "not signed" in limbeck("models", "sbom", "still@production", "--verify").out
    public = signing.create_key(tmp_path / "ada.pem")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ada.pem"))
    scored.score(version, usd=3.0, harness="lm-eval 1")  # the alias keeps the SBOM of its promotion
    written = limbeck("models", "sbom", "still@production", "--attest", "--output", tmp_path / "out" / "sbom.json")
    assert written.code == 0, written.err
    assert read_sbom(tmp_path / "out") == attestation.sbom_of_ref(store, "still@production")
    assert (
        f"signed with {public}, a key that was not checked"
        in limbeck("models", "sbom", "still@production", "--verify").out
    )
    (tmp_path / "trusted").write_text(f"{public} ada\n")
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    assert "signed by ada" in limbeck("models", "sbom", "still@production", "--verify").out
    weights = store.artifacts.verified_folder(version) / "model.onnx"
    weights.write_text("other")
    damaged = limbeck("models", "sbom", "still@production", "--verify")
    assert (damaged.code, "is damaged" in damaged.err) == (2, True)
