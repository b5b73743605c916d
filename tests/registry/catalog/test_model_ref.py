"""How a MODEL is resolved, and the errors of one that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from limbeck.registry.catalog.model_ref import resolve_model, resolve_models
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.digest import folder_digest, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError, Unreachable
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.registry.checkpoints.gguf.gguf_files import sizes, tokens_of_folder, write_model


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, for tests that damage it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def test_a_folder_needs_no_store(llama: Path, limbeck_home: Path) -> None:
    model = resolve_model(str(llama))
    assert (model.path, model.label, model.version, model.engine) == (llama, str(llama), None, "torch")
    assert model.digest == folder_digest(llama)
    assert resolve_model("llama").label == "llama"  # as the user wrote it, from the current folder
    assert not limbeck_home.exists()


def test_registered_versions(llama: Path, store: Store, make_folder: Callable[..., Path]) -> None:
    first = store.register(NewVersion(name="still", kind="student"), llama)
    assert resolve_model("still", store).version == first  # the only one
    second = store.register(NewVersion(name="still", kind="onnx", engine="onnxruntime"), make_folder("b", onnx=True))
    store.client.set_registered_model_alias("still", "production", "2")
    for text in ("still/2", "still@production", "models:/still/2", "models:/still@production"):
        model = resolve_model(text, store)
        assert (model.label, model.digest, model.engine) == ("still/2", second.digest, "onnxruntime")
        assert (model.path / "model.onnx").is_file()
    with pytest.raises(BadInput, match="2 versions"):
        resolve_model("still", store)
    everything = resolve_models(["still", "still/2", str(llama)], store)
    assert [model.label for model in everything] == ["still/1", "still/2", str(llama)]


def test_unknown_names_get_a_suggestion(llama: Path, store: Store) -> None:
    store.register(NewVersion(name="still", kind="student"), llama)
    with pytest.raises(BadInput, match="did you mean still"):
        resolve_model("stil/1", store)
    with pytest.raises(BadInput, match="it has 1"):
        resolve_model("still/7", store)
    with pytest.raises(BadInput, match=r"no alias 'prod'\n.*limbeck promote"):
        resolve_model("still@prod", store)


def test_a_hub_id_without_a_hub(store: Store) -> None:
    with pytest.raises(Unreachable, match="neither a local folder nor a registered model"):
        resolve_model("someone/some-model", store)
    with pytest.raises(LimbeckError, match="is not a model"):
        resolve_model("what is this?", store)


@pytest.mark.parametrize("text", ["./gone", "/gone/too", "gone/"])
def test_a_folder_that_does_not_exist(text: str, limbeck_home: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        resolve_model(text)


def test_folders_that_are_not_a_model(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pickle files only \(pytorch_model.bin\)"):
        resolve_model(str(llama))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match=r"no \*.safetensors"):
        resolve_model(str(llama))
    (llama / "config.json").unlink()
    with pytest.raises(BadInput, match=r"no config\.json"):
        resolve_model(str(llama))
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="is an adapter of type None; Limbeck merges LORA"):
        resolve_model(str(llama))


def test_a_gguf_file(tiny_llama: Path, tmp_path: Path, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, and as the only one of a folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    model = load_model(tiny_llama)
    file = write_model(folder / "tiny.gguf", model, "llama", sizes(model), tokens_of_folder(tiny_llama))
    monkeypatch.chdir(folder)
    found = resolve_models(["tiny.gguf", str(file), str(folder), "."])
    assert [each.label for each in found] == ["tiny.gguf", str(file), str(folder), "."]
    assert len({(each.path, each.digest, each.engine) for each in found}) == 1
    assert found[0].digest == folder_digest(found[0].path)
    assert found[0].path.is_relative_to(limbeck_home / "checkpoints")
    assert not (limbeck_home / "mlflow.db").exists()
    with pytest.raises(BadInput, match=r"gone\.gguf: no such file"):
        resolve_model("gone.gguf")
    shutil.copy(file, folder / "other.gguf")
    with pytest.raises(BadInput, match=r"has 2 GGUF files: other\.gguf, tiny\.gguf\n.*name one"):
        resolve_model(str(folder))


def test_an_adapter_alone_and_with_its_base(tiny_llama: Path, tmp_path: Path, store: Store) -> None:
    adapter = tmp_path / "lora"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(adapter)
    alone = resolve_model(str(adapter), store)
    assert (alone.engine, alone.label) == ("torch", str(adapter))
    store.register(NewVersion(name="base", kind="student"), tiny_llama)
    for text in (f"{tiny_llama}+{adapter}", f"base/1+{adapter}", f"base+{adapter}"):
        named = resolve_models([text], store)[0]
        assert (named.path, named.digest, named.label) == (alone.path, alone.digest, text)
    with pytest.raises(BadInput, match=r"its base model gone/1 cannot be used: .*\n.*BASE\+"):
        resolve_model(f"gone/1+{adapter}", store)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DamagedArtifact, match=r"adapter_model\.safetensors"):
        resolve_model(str(adapter), store)


def test_a_folder_with_an_adapter_beside_the_whole_model(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    assert resolve_model(str(llama)).path == llama


def test_other_kinds_of_models(llama: Path) -> None:
    config = llama / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(BadInput, match=r"quantized checkpoint \(gptq\)\n.*give the unquantized model"):
        resolve_model(str(llama))
    config.write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(BadInput, match=r"t5 is an encoder-decoder: Limbeck takes causal \(decoder-only\)"):
        resolve_model(str(llama))


def test_truncated_weights(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors"):
        resolve_model(str(llama))


def test_a_missing_shard(llama: Path) -> None:
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}'
    (llama / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DamagedArtifact, match=r"model-00002\.safetensors is missing"):
        resolve_model(str(llama))


def test_files_that_are_not_those_of_the_manifest(llama: Path) -> None:
    write_manifest(llama)
    assert resolve_model(str(llama)).digest == folder_digest(llama)
    tokenizer = llama / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(DamagedArtifact, match=r"tokenizer\.json has sha256"):
        resolve_model(str(llama))


def test_a_config_that_is_not_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(DamagedArtifact, match=r"config.json is not JSON"):
        resolve_model(str(llama))
