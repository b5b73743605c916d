"""The store has a version completely and verified, or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from limbeck.registry.core.digest import folder_digest, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError
from limbeck.registry.core.home import home
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion

MakeFolder = Callable[..., Path]


def stored_models(store: Store) -> list[str]:
    """The LoggedModels in the store, and their folders."""
    ids = [e.experiment_id for e in store.client.search_experiments()]
    found = [m.model_id for m in store.client.search_logged_models(experiment_ids=ids)]
    return found + [str(p) for p in (home() / "artifacts").glob("models/*")]


def test_a_version_has_its_fields_and_files(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder("a")
    made = store.register(
        NewVersion(name="still", kind="student", parent="still/9", recipe="small", params=7),
        folder,
        extra_tags={"colour": "red"},
    )
    assert store.get("still/1") == made
    assert (made.ref, made.digest, made.parent, made.params) == ("still/1", folder_digest(folder), "still/9", 7)
    shutil.rmtree(folder)
    assert folder_digest(store.artifacts.verified_folder(made)) == made.digest
    assert store.artifacts.find_local_folder(made) == store.artifacts.verified_folder(made)
    assert store.client.get_model_version("still", "1").tags["colour"] == "red"


def test_registering_the_same_again_stores_nothing(store: Store, make_folder: MakeFolder) -> None:
    first = store.register(NewVersion(name="still", kind="student", parent="still/9"), make_folder("a"))
    assert (
        store.register(NewVersion(name="still", kind="student", parent="still/9"), make_folder("b") / ".." / "a")
        == first
    )
    other = store.register(
        NewVersion(name="still", kind="student", parent="still/8"), store.artifacts.verified_folder(first)
    )
    assert (other.version, other.digest) == (2, first.digest)  # another parent makes another version
    assert len(stored_models(store)) == 2 * 2


def register_together(home: str, uri: str, folders: list[Path], start: Barrier) -> None:
    """Register folders on a machine with a state folder of its own, each at the same moment as another machine."""
    os.environ |= {"LIMBECK_HOME": home, "MLFLOW_TRACKING_URI": uri}
    store = Store()
    for folder in folders:
        start.wait(60)
        store.register(NewVersion(name="still", kind="student"), folder)


def test_two_machines_that_register_the_same_folder_make_one_version(
    limbeck_home: Path, empty_database: Path, make_folder: MakeFolder, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'shared.db')}"
    context = get_context("fork")  # MLflow is imported, and nobody has opened this database yet
    start = context.Barrier(2)
    folders = [make_folder(letter) for letter in "abcd"]
    homes = [str(tmp_path / machine) for machine in ("one", "two")]
    machines = [context.Process(target=register_together, args=(each, uri, folders, start)) for each in homes]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [0, 0]
    store = Store(uri)
    versions = store.versions("still")
    assert [version.digest for version in versions] == [folder_digest(folder) for folder in folders]
    for version in versions:
        store.artifacts.verified_folder(version)


def test_versions_are_found_by_name_reference_alias_and_field(store: Store, make_folder: MakeFolder) -> None:
    store.register(NewVersion(name="still", kind="student", recipe="small"), make_folder("a"))
    second = store.register(NewVersion(name="still", kind="student", recipe="small"), make_folder("b"))
    third = store.register(NewVersion(name="kettle", kind="onnx", precision="int8-weight"), make_folder("c", onnx=True))
    store.client.set_registered_model_alias("still", "production", "2")
    assert [v.ref for v in store.versions()] == ["kettle/1", "still/1", "still/2"]
    assert [v.aliases for v in store.versions("still")] == [(), ("production",)]
    assert store.versions("still")[1] == store.get("still@production") == store.get("models:/still/2")
    assert (
        store.versions("kettle") == store.versions(filter_string="tags.`limbeck.precision` = 'int8-weight'") == [third]
    )
    assert store.find_version("still", recipe="small").ref == second.ref  # the newest
    assert store.find_version("still", recipe="large") is None
    assert store.model_names() == ["kettle", "still"]
    assert store.aliases("still") == {"production": 2}
    assert store.aliases("nothing") == {}
    assert store.versions("it's' or name='still") == []


def test_a_version_registered_without_limbeck_is_not_listed(store: Store) -> None:
    store.client.create_registered_model("foreign")
    store.client.create_model_version("foreign", "/tmp/nowhere")
    assert store.versions() == []
    with pytest.raises(BadInput, match="was not registered by Limbeck"):
        store.get("foreign/1")


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "../a", "a b", "it's", "-a", "x" * 201, "a\n"])
def test_invalid_names(store: Store, make_folder: MakeFolder, name: str) -> None:
    with pytest.raises(BadInput, match="is not a name for a model"):
        store.register(NewVersion(name=name, kind="student"), make_folder("a"))


@pytest.mark.parametrize("ref", ["still", "still/", "still/x", "a/b/1", "still/" + "9" * 30, "still/-1", "@production"])
def test_invalid_references(store: Store, ref: str) -> None:
    with pytest.raises(BadInput, match="is not a version"):
        store.get(ref)


def test_a_missing_or_empty_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        store.register(NewVersion(name="still", kind="student"), tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="an empty folder"):
        store.register(NewVersion(name="still", kind="student"), tmp_path / "empty")


def test_files_that_do_not_match_the_manifest(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder("a")
    write_manifest(folder)
    with (folder / "model.safetensors").open("a") as file:
        file.write("!")
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors has sha256"):
        store.register(NewVersion(name="still", kind="student"), folder)
    assert store.versions() == stored_models(store) == []


def test_files_that_change_on_the_way_are_refused(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder("a")
    (blobs := folder.parent.parent / "blobs").mkdir()
    (blobs / "uuid").symlink_to("/proc/sys/kernel/random/uuid")  # different content at each read
    (folder / "changing").symlink_to("../../blobs/uuid")  # as in the Hugging Face cache
    with pytest.raises(DamagedArtifact, match="digest is"):
        store.register(NewVersion(name="still", kind="student"), folder)
    assert store.versions() == stored_models(store) == []


def test_files_changed_or_deleted_later(store: Store, make_folder: MakeFolder) -> None:
    version = store.register(NewVersion(name="still", kind="student"), make_folder("a"))
    weights = store.artifacts.verified_folder(version) / "model.safetensors"
    weights.write_text(weights.read_text()[:-1])
    with pytest.raises(DamagedArtifact, match="digest is"):
        store.artifacts.verified_folder(version)
    shutil.rmtree(weights.parent)
    with pytest.raises(DamagedArtifact, match="still/1 is damaged: its files are gone"):
        store.artifacts.verified_folder(version)
    assert store.artifacts.find_local_folder(version) is None


def test_a_store_that_fails_midway_keeps_nothing(store: Store, make_folder: MakeFolder) -> None:
    store.register(NewVersion(name="still", kind="student"), make_folder("a"))
    stands = stored_models(store)
    models = home() / "artifacts" / "models"
    models.rename(models.with_name("away"))
    models.write_text("no folder can be made in here")
    with pytest.raises(LimbeckError, match=r"mlflow\.db: "):
        store.register(NewVersion(name="still", kind="student"), make_folder("b"))
    models.unlink()
    models.with_name("away").rename(models)
    assert stored_models(store) == stands
    assert store.register(NewVersion(name="still", kind="student"), make_folder("c")).version == 2


@pytest.fixture
def small_disk(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder with an empty store on a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        monkeypatch.setenv("LIMBECK_HOME", str(disk))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shutil.copy(empty_database, disk / "mlflow.db")
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, make_folder: MakeFolder) -> None:
    store = Store()
    folder = make_folder("a")
    (folder / "large.safetensors").write_bytes(bytes(8 << 20))
    with pytest.raises(LimbeckError, match=r"no space left on the disk.*\n.*free some space"):
        store.register(NewVersion(name="still", kind="student"), folder)
    assert store.versions() == stored_models(store) == []
    assert store.register(NewVersion(name="still", kind="student"), make_folder("b")).version == 1


def test_a_file_that_reaches_the_size_limit(store: Store, make_folder: MakeFolder) -> None:
    """As a full disk, for machines that cannot mount a small disk: the system refuses to write a large file."""
    folder = make_folder("a")
    (folder / "large.safetensors").write_bytes(bytes(8 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    try:
        with pytest.raises(LimbeckError, match="File too large"):
            store.register(NewVersion(name="still", kind="student"), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.versions() == stored_models(store) == []


def test_the_status_of_a_run_follows_from_how_its_block_ends(store: Store) -> None:
    with store.runs.start("good", params={"a b!": 1}, tags={"t": "x"}) as run:
        run.log_metrics({"loss": 0.5}, step=3)
        run.set_tags({"more": 2})
    logged = store.client.get_run(run.id)
    assert (logged.info.status, logged.data.params, logged.data.metrics) == ("FINISHED", {"a b_": "1"}, {"loss": 0.5})
    assert (logged.data.tags["t"], logged.data.tags["more"]) == ("x", "2")
    for error, status in ((KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")):
        with pytest.raises(error), store.runs.start("bad") as run:
            raise error
        assert store.client.get_run(run.id).info.status == status


def test_a_deleted_experiment(store: Store, make_folder: MakeFolder) -> None:
    store.register(NewVersion(name="still", kind="student"), make_folder("a"))
    store.client.delete_experiment(store.client.get_experiment_by_name("limbeck").experiment_id)
    with pytest.raises(BadInput, match=r"is deleted\n.*mlflow experiments restore"):
        Store().register(NewVersion(name="still", kind="student"), make_folder("b"))


@pytest.mark.timeout(30)  # MLflow alone would retry for minutes
def test_an_invalid_database(limbeck_home: Path) -> None:
    limbeck_home.mkdir()
    database = limbeck_home / "mlflow.db"
    database.write_text("this is no database at all, but some text that is long enough")
    with pytest.raises(LimbeckError, match="not a database"):
        Store()
    database.unlink()
    database.mkdir()
    with pytest.raises(LimbeckError, match="it cannot be opened"):
        Store()
