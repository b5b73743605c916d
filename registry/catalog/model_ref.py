"""Resolves a MODEL of the command line: a local folder, a registered version, a hub id or an endpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.catalog import endpoint
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

    Tries in this order: the URL of an endpoint; a local folder; `NAME/VERSION`, `NAME@ALIAS` or a `models:/` URI; the
    only version of a registered NAME; a Hugging Face hub id. Opens the tracking store only for a registered name.
    Verifies the files: with their manifest, and with the digest of a registered version.

    Args:
        text: as the user wrote it.
        store: for registered models; None for the default store.
        revision: branch, tag or commit of a hub id.
        tokenizer: of an endpoint, as a MODEL or a folder; None if an endpoint is not allowed.
        num_concurrent: number of concurrent requests to an endpoint, at most.

    Raises:
        BadInput: nothing has this name, the folder is not a model, or the weights are only in pickle files.
        DamagedArtifact: files that are truncated or are not those recorded.
        Unreachable: the tracking server, the hub or the endpoint does not answer.
    """
    if URL.match(text):
        return _endpoint(text, store, tokenizer, num_concurrent)
    folder = _folder(text)
    looks_local = text.startswith(("/", "./", "../", "~")) or text.endswith("/") or text in (".", "..")
    if looks_local or (folder / "config.json").exists() or (folder.is_dir() and "/" in text):
        if not folder.is_dir():
            raise BadInput(f"{text}: no such folder")
        return _local(folder, text)
    if REGISTERED.fullmatch(text):
        store = store or _default_store()
        return load_registered_version(store.get(text), store)
    if "/" not in text:
        store = store or _default_store()
        versions = store.versions(text)
        if len(versions) == 1:
            return load_registered_version(versions[0], store)
        if versions:
            refs = ", ".join(version.ref for version in versions[-8:])
            raise BadInput(f"{text} has {len(versions)} versions", fix=f"name one of them: {refs}")
        if folder.is_dir():
            return _local(folder, text)
    if not HUB_ID.fullmatch(text):
        raise BadInput(
            f"{text!r} is not a model",
            fix="give a local folder, NAME/VERSION, NAME@ALIAS or a Hugging Face hub id",
        )
    return _local(_snapshot(text, revision), text)


def resolve_models(
    texts: Iterable[str], store: Store | None = None, *, tokenizer: str | None = None, num_concurrent: int = 4
) -> list[ResolvedModel]:
    """As `resolve_model`, for several; a registered NAME stands for all its versions, oldest first."""
    models: dict[str, ResolvedModel] = {}
    for text in texts:
        found = []
        if "/" not in text and "@" not in text and not (Path(text) / "config.json").exists():
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
        if (folder / "adapter_config.json").exists():
            raise BadInput(f"{folder} has an adapter, not a whole model", fix="merge it into its base model first")
        raise BadInput(f"{folder} is not a model: it has no config.json", fix="give a transformers checkpoint")
    _read_json(folder, config.name)
    if any(folder.glob("*.onnx")):
        return "onnxruntime"
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


def _local(folder: Path, label: str) -> ResolvedModel:
    engine = engine_of_folder(folder)
    return ResolvedModel(folder.resolve(), verify_files(folder), label, None, engine)


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
