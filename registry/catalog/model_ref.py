"""Resolves a MODEL of the command line: local files, a registered version, a hub id or an endpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.catalog import endpoint
from limbeck.registry.checkpoints import adapter
from limbeck.registry.checkpoints.conversions import Converted
from limbeck.registry.checkpoints.gguf.convert import checkpoint_of_gguf
from limbeck.registry.checkpoints.gguf.file import SUFFIX, only_gguf_file
from limbeck.registry.checkpoints.kinds import refuse_other_kinds
from limbeck.registry.checkpoints.quantized import needs_conversion, plain_checkpoint
from limbeck.registry.core.digest import MANIFEST, file_digest, json_digest, verify_files
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Unreachable
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Engine, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

URL = re.compile(r"https?://", re.IGNORECASE)
REGISTERED = re.compile(r"models:/.*|[^/@]+/\d+|[^/@]+@[^/@]+")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ENDPOINT = "endpoint.json"  # in the folder of a registered endpoint: its url and name
TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # include the tokenizer's files
HUB_FILES = [*TEXT_FILES, "*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ResolvedModel:
    """An artifact on this machine: its folder, digest, label and engine.

    For an endpoint, the folder is that of its tokenizer, and the digest covers URL, name and tokenizer: the model that
    the server runs is unknown.
    """

    path: Path
    digest: str
    label: str  # NAME/VERSION, else what the user wrote
    version: Version | None
    engine: Engine
    endpoint: endpoint.Endpoint | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return _has_tokenizer(self.path)


def resolve_model(
    text: str,
    store: Store | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    num_concurrent: int = 4,
) -> ResolvedModel:
    """The model that `text` names.

    Tries in this order: the URL of an endpoint; `BASE+ADAPTER`, any MODEL with the folder of a LoRA adapter for it; a
    local folder or .gguf file; `NAME/VERSION`, `NAME@ALIAS` or a `models:/` URI; the only version of a registered NAME;
    a Hugging Face hub id. Opens the tracking store only for a registered name.

    A local folder or hub repository holds a checkpoint, an ONNX artifact, one .gguf file, or a LoRA adapter that names
    its base model. A GGUF file, an adapter and weights in mxfp4 or fp8 are converted once to a checkpoint in float32,
    in Limbeck's home; the result is that checkpoint. Verifies the files: with their manifest, and with the digest of a
    registered version.

    Args:
        text: as the user wrote it.
        store: for registered models; None for the default store.
        revision: branch, tag or commit of a hub id.
        tokenizer: of an endpoint, as a MODEL or a folder; None if an endpoint is not allowed.
        num_concurrent: number of concurrent requests to an endpoint, at most.

    Raises:
        BadInput: nothing has this name; the folder is not a model, or another kind of model than a causal language
            model; the weights are only in pickle files, or quantized in a way that cannot be undone.
        DamagedArtifact: files that are truncated or are not those recorded.
        Unreachable: the tracking server, the hub or the endpoint does not answer.
    """
    if URL.match(text):
        return _endpoint(text, store, tokenizer, num_concurrent)
    if parts := _base_and_adapter(text):
        return _merged(*parts, store, label=text)
    folder = _folder(text)
    if _is_local(text) or (folder.is_dir() and "/" in text):
        if not folder.exists():
            raise BadInput(f"{text}: no such {'file' if folder.suffix.lower() == SUFFIX else 'folder'}")
        return _local(folder, text, store)
    if REGISTERED.fullmatch(text):
        store = store or _default_store()
        return load_registered_version(store.get(text), store)
    if "/" not in text:
        store = store or _default_store()
        if version := _only_version(text, store):
            return load_registered_version(version, store)
    if folder.is_dir():
        return _local(folder, text, store)
    if not HUB_ID.fullmatch(text):
        raise BadInput(
            f"{text!r} is not a model",
            fix="give a local folder or .gguf file, NAME/VERSION, NAME@ALIAS, a Hugging Face hub id, or BASE+ADAPTER",
        )
    return _local(_snapshot(text, revision), text, store)


def _only_version(name: str, store: Store) -> Version | None:
    """The version of a name that has one; None if the name is not registered. Raises BadInput if it has several."""
    versions = store.versions(name)
    if len(versions) > 1:
        refs = ", ".join(version.ref for version in versions[-8:])
        raise BadInput(f"{name} has {len(versions)} versions", fix=f"name one of them: {refs}")
    return versions[0] if versions else None


def resolve_models(
    texts: Iterable[str], store: Store | None = None, *, tokenizer: str | None = None, num_concurrent: int = 4
) -> list[ResolvedModel]:
    """As `resolve_model`, for several; a registered NAME stands for all its versions, oldest first."""
    models: dict[str, ResolvedModel] = {}
    for text in texts:
        found = []
        if "/" not in text and "@" not in text and not _is_local(text):
            store = store or _default_store()
            found = [load_registered_version(version, store) for version in store.versions(text)]
            if len(found) > 1:  # without its tokenizer, an endpoint can only generate text, not score
                found = [model for model in found if not model.endpoint or model.has_tokenizer]
        for model in found or [resolve_model(text, store, tokenizer=tokenizer, num_concurrent=num_concurrent)]:
            models.setdefault(model.label, model)
    return list(models.values())


def load_registered_version(version: Version, store: Store) -> ResolvedModel:
    """A registered version; fetches its files if they are not on this machine, and verifies them.

    Sends no request to an endpoint.
    """
    folder = store.artifacts.verified_folder(version)
    registered_endpoint = None
    if version.engine == "endpoint":
        fields = _read_json(folder, ENDPOINT)
        if not (isinstance(fields.get("name"), str) and URL.match(str(fields.get("url")))):
            raise DamagedArtifact(folder, [f"{ENDPOINT} does not name an endpoint"])
        registered_endpoint = endpoint.Endpoint(fields["url"], fields["name"])
    return ResolvedModel(folder, version.digest, version.ref, version, version.engine, registered_endpoint)


def engine_of_folder(folder: Path) -> Engine:
    """The engine that runs the model in `folder`: onnxruntime if there are *.onnx files, else torch.

    Raises BadInput if Limbeck cannot run it, DamagedArtifact if its weights are truncated.
    """
    config = folder / "config.json"
    if not config.is_file():
        if (folder / adapter.CONFIG).exists():
            raise BadInput(f"{folder} has an adapter, not a whole model", fix="merge it into its base model first")
        raise BadInput(
            f"{folder} is not a model: it has no config.json", fix="give a transformers checkpoint or a .gguf file"
        )
    found = _read_json(folder, config.name)
    if any(folder.glob("*.onnx")):
        return "onnxruntime"
    refuse_other_kinds(found, str(folder))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise BadInput(
                f"{folder} has its weights in pickle files only ({', '.join(pickles[:3])}), "
                "and loading those can run any code",
                fix="if you trust it, save it with save_pretrained(..., safe_serialization=True)",
            )
        raise BadInput(f"{folder} is not a model: it has no *.safetensors and no *.onnx")
    _check_weights(folder, weights)
    return "torch"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises DamagedArtifact."""
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedArtifact(folder, [f"{name} is not JSON: {error}"]) from None
    if not isinstance(found, dict):
        raise DamagedArtifact(folder, [f"{name} is not a JSON object"])
    return found


def _check_weights(folder: Path, weights: list[Path]) -> None:
    """Raises DamagedArtifact if a shard is missing or truncated."""
    from safetensors import SafetensorError, safe_open

    problems = []
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(folder, index.name).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DamagedArtifact(folder, [f"the weight_map of {index.name} does not name files"])
        shards = set(weight_map.values())
        problems += [f"{name} is missing" for name in sorted(shards - {path.name for path in weights})]
    for path in weights:
        try:
            with safe_open(path, framework="np"):  # reads the header, checks the length
                pass
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise DamagedArtifact(folder, problems)


def _folder(text: str) -> Path:
    """The folder that `text` names; inside a bundle (`limbeck.export.bundle.layout`), that of the artifact."""
    folder = Path(text).expanduser()
    inner = folder / "model"
    return inner if (folder / MANIFEST).is_file() and (inner / MANIFEST).is_file() else folder


def _is_local(text: str) -> bool:
    """Whether `text` can only be a local path, or names a model or an adapter there, before any registered name."""
    if text.startswith(("/", "./", "../", "~")) or text.endswith("/") or text in (".", ".."):
        return True
    folder = _folder(text)
    if folder.suffix.lower() == SUFFIX or _base_and_adapter(text):
        return True
    return any((folder / name).exists() for name in ("config.json", adapter.CONFIG))


def _base_and_adapter(text: str) -> tuple[str, Path] | None:
    """The parts of BASE+ADAPTER; None if `text` is something else."""
    base, _, name = text.rpartition("+")
    folder = Path(name).expanduser()
    if not base or Path(text).expanduser().exists() or not (folder / adapter.CONFIG).is_file():
        return None
    return base, folder


def _local(path: Path, label: str, store: Store | None) -> ResolvedModel:
    if path.is_file():
        return _converted(checkpoint_of_gguf(path), label)
    if (path / adapter.CONFIG).is_file() and not _has_own_weights(path):
        base, revision = adapter.base_of_adapter(path)
        return _merged(base, path, store, label=label, revision=revision)
    if not (path / "config.json").is_file() and (file := only_gguf_file(path)):
        return _converted(checkpoint_of_gguf(file), label)
    engine, digest = engine_of_folder(path), verify_files(path)
    if engine == "torch" and (conversion := needs_conversion(_read_json(path, "config.json"))):
        return _converted(plain_checkpoint(path, digest, conversion, label), label)
    return ResolvedModel(path.resolve(), digest, label, None, engine)


def _has_own_weights(folder: Path) -> bool:
    """Whether a folder with an adapter holds a whole model too, as a merged one may."""
    others = [path for path in folder.glob("*.safetensors") if path.name != adapter.WEIGHTS]
    return (folder / "config.json").is_file() and bool(others)


def _merged(base: str, folder: Path, store: Store | None, *, label: str, revision: str | None = None) -> ResolvedModel:
    """The model of an adapter, merged into the base model that `base` names."""
    if (folder / adapter.WEIGHTS).is_file():
        _check_weights(folder, [folder / adapter.WEIGHTS])
    adapter.read_adapter_config(folder)
    try:
        model = resolve_model(base, store, revision=revision)
    except (BadInput, Unreachable) as error:
        raise BadInput(
            f"{folder}: its base model {base} cannot be used: {error.message}",
            fix=f"name the base model that it was trained on: BASE+{folder}",
        ) from error
    if model.engine != "torch":
        raise BadInput(f"{base} is not a PyTorch model", fix="name the PyTorch model that the adapter was trained on")
    return _converted(adapter.merged_checkpoint(folder, model.path, model.digest), label)


def _converted(checkpoint: Converted, label: str) -> ResolvedModel:
    return ResolvedModel(checkpoint.path, checkpoint.digest, label, None, "torch")


def _endpoint(text: str, store: Store | None, tokenizer: str | None, num_concurrent: int) -> ResolvedModel:
    if tokenizer is None:
        raise BadInput(
            f"{endpoint.url_without_secrets(text)} is an endpoint, which has no files",
            fix="to score it, give its tokenizer: --tokenizer MODEL",
        )
    folder = _folder(tokenizer)
    if not folder.is_dir():
        hub_id = not REGISTERED.fullmatch(tokenizer) and "/" in tokenizer and HUB_ID.fullmatch(tokenizer)
        folder = _snapshot(tokenizer, None, TEXT_FILES) if hub_id else resolve_model(tokenizer, store).path
    if not _has_tokenizer(folder):
        raise BadInput(f"{tokenizer} has no tokenizer", fix="give --tokenizer the model that the endpoint serves")
    found = endpoint.find_endpoint(text, num_concurrent)
    files = sorted({path for pattern in TEXT_FILES for path in folder.glob(pattern) if path.name != MANIFEST})
    digest = json_digest([found.url, found.name, {path.name: file_digest(path) for path in files}])
    return ResolvedModel(folder.resolve(), digest, found.label, None, "endpoint", found)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def _snapshot(hub_id: str, revision: str | None, files: list[str] = HUB_FILES) -> Path:
    """The local folder of a hub repository's files; downloads those that are not in the hub's cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        if isinstance(error, hub.GatedRepoError):
            why = "is gated"
        elif isinstance(error, hub.RevisionNotFoundError):
            why = f"has no revision {revision}"
        else:
            why = "does not exist or is private"
        raise BadInput(
            f"{hub_id!r} is neither a local folder nor a registered model, and on the hub it {why}",
            fix="check the name; log in with `hf auth login` if it needs an account",
        ) from None
    except hub.HFValidationError as error:
        raise BadInput(f"{hub_id!r} is not a local folder, registered model or hub id: {error}") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set" if offline else str(error).split("\n")[0][:200]
        raise Unreachable(
            f"{hub_id!r} is neither a local folder nor a registered model, and the hub cannot be reached: {reason}",
            fix="check the name; `limbeck models list` shows what is registered",
        ) from None


def _default_store() -> Store:
    return Store()
