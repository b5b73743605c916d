"""What a MODEL on the command line means: a local folder, a registered version, a hub id or an endpoint."""

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
TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # a tokenizer is among them
HUB_FILES = [*TEXT_FILES, "*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ResolvedModel:
    """An artifact at hand: its folder, and what it is called.

    Of an endpoint the folder is that of its tokenizer, and the digest is over URL, name and tokenizer: what the
    server runs behind them cannot be known.
    """

    path: Path
    digest: str
    label: str  # NAME/VERSION, else what the user wrote
    version: Version | None
    engine: Engine
    endpoint: endpoint.Endpoint | None = None

    @property
    def has_tokenizer(self) -> bool:
        return _has_tokenizer(self.path)


def resolve_model(
    text: str,
    store: Store | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    num_concurrent: int = 4,
) -> ResolvedModel:
    """The model that `text` means.

    In this order: an endpoint's URL; a local folder; `NAME/VERSION`, `NAME@ALIAS` or a `models:/` URI; the only
    version of a registered NAME; a Hugging Face hub id. The tracking store is opened only where one of the middle
    two may be meant. The files are checked: against their manifest, and against the digest of a registered version.

    Args:
        text: as the user wrote it.
        store: where registered models are looked for; the default one where None.
        revision: of a hub id: a branch, tag or commit.
        tokenizer: an endpoint's, as a MODEL or a folder; None where no endpoint can be used.
        num_concurrent: the most requests that an endpoint is asked at a time.

    Raises:
        BadInput: nothing of this name, a folder that is no model, or weights in pickle files only.
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
        if versions := store.versions(text):
            if len(versions) == 1:
                return load_registered_version(versions[0], store)
            numbers = ", ".join(version.ref for version in versions[-8:])
            raise BadInput(f"{text} has {len(versions)} versions", fix=f"name one of them: {numbers}")
        if folder.is_dir():
            return _local(folder, text)
    if not HUB_ID.fullmatch(text):
        raise BadInput(
            f"{text!r} is no model",
            fix="give a local folder, NAME/VERSION, NAME@ALIAS or a Hugging Face hub id",
        )
    return _local(_snapshot(text, revision), text)


def resolve_models(
    texts: Iterable[str], store: Store | None = None, *, tokenizer: str | None = None, num_concurrent: int = 4
) -> list[ResolvedModel]:
    """As `resolve`, for several; a registered NAME alone stands for all its versions, oldest first."""
    models: dict[str, ResolvedModel] = {}
    for text in texts:
        found = []
        if "/" not in text and "@" not in text and not (Path(text) / "config.json").exists():
            store = store or _default_store()
            found = [load_registered_version(version, store) for version in store.versions(text)]
            if len(found) > 1:  # an endpoint whose tokenizer is not known can only be asked for text
                found = [model for model in found if not model.endpoint or model.has_tokenizer]
        for model in found or [resolve_model(text, store, tokenizer=tokenizer, num_concurrent=num_concurrent)]:
            models.setdefault(model.label, model)
    return list(models.values())


def load_registered_version(version: Version, store: Store) -> ResolvedModel:
    """A registered version as a Model; its files are fetched where they lie elsewhere, and verified.

    An endpoint is not asked whether it is there.
    """
    folder = store.artifacts.verified_folder(version)
    found = None
    if version.engine == "endpoint":
        said = _json(folder, ENDPOINT)
        if not (isinstance(said.get("name"), str) and URL.match(str(said.get("url")))):
            raise DamagedArtifact(folder, [f"{ENDPOINT} names no endpoint"])
        found = endpoint.Endpoint(said["url"], said["name"])
    return ResolvedModel(folder, version.digest, version.ref, version, version.engine, found)


def engine_of_folder(folder: Path) -> Engine:
    """Which engine runs the model in `folder`: onnxruntime where *.onnx files are, else torch.

    Raises BadInput where it is no model that Limbeck runs, DamagedArtifact where its weights are truncated.
    """
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").exists():
            raise BadInput(f"{folder} holds an adapter, no whole model", fix="merge it into its base model first")
        raise BadInput(f"{folder} is no model: it has no config.json", fix="give a transformers checkpoint")
    _json(folder, config.name)
    if any(folder.glob("*.onnx")):
        return "onnxruntime"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise BadInput(
                f"{folder} has its weights in pickle files only ({', '.join(pickles[:3])}), "
                "and loading those can run any code",
                fix="save it with save_pretrained(..., safe_serialization=True) where you trust it",
            )
        raise BadInput(f"{folder} is no model: it has no *.safetensors and no *.onnx")
    _check_weights(folder, weights)
    return "torch"


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises DamagedArtifact."""
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedArtifact(folder, [f"{name} is not JSON: {error}"]) from None
    if not isinstance(found, dict):
        raise DamagedArtifact(folder, [f"{name} is no JSON object"])
    return found


def _check_weights(folder: Path, weights: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    problems = []
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _json(folder, index.name).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DamagedArtifact(folder, [f"the weight_map of {index.name} names no files"])
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
    """The folder that `text` names; the artifact's where that is a bundle (limbeck.export.bundle.layout)."""
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
    """The local folder of a hub repository's files, downloaded where they are not in its cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        why = {
            hub.GatedRepoError: "asks for access",
            hub.RevisionNotFoundError: f"has no revision {revision}",
        }
        words = next((w for kind, w in why.items() if isinstance(error, kind)), "does not exist or is private")
        raise BadInput(
            f"{hub_id!r} is no local folder and no registered model, and on the hub it {words}",
            fix="check the name; log in with `hf auth login` where it needs an account",
        ) from None
    except hub.HFValidationError as error:
        raise BadInput(f"{hub_id!r} is no local folder, registered model or hub id: {error}") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why_not = "HF_HUB_OFFLINE is set" if offline else str(error).split("\n")[0][:200]
        raise Unreachable(
            f"{hub_id!r} is no local folder and no registered model, and the hub cannot be asked: {why_not}",
            fix="check the name; `limbeck models list` shows what is registered",
        ) from None


def _default_store() -> Store:
    return Store()
