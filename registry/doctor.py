"""What is installed, what is reachable, and what is wrong with what is registered."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import DamagedArtifact, LimbeckError, redacted
from limbeck.registry.core.home import home, tracking_uri
from limbeck.registry.core.machine import cpu_bf16, proc
from limbeck.registry.core.terminal import bytes_said, progress
from limbeck.registry.gate import audit
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.transfer import discard
from limbeck.registry.policy import stored
from limbeck.registry.records import Version

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"  # only in a source tree
LEAST_DISK = 2**30  # bytes
HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    state: Literal["ok", "note", "wrong"]  # note: works, but worth knowing
    what: str
    found: str
    fix: str | None = None  # of what is wrong

    def json(self) -> dict[str, Any]:
        """`{state, what, found, fix}`."""
        return asdict(self)


def examine(*, deep: bool = False, clean: bool = False) -> Iterator[Check]:
    """Look at everything; a check that fails is told of and the next one goes on.

    Args:
        deep: verify the digest of every version's files; from a server they are fetched.
        clean: take away the uploads that nobody went on with for a day.
    """
    yield Check("ok", "python", f"{platform.python_version()} at {sys.executable}")
    yield from _packages()
    yield from _machine()
    yield _hub()
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Check("note", "tracking store", f"{uri} is not there yet; the first command that needs it makes it")
        return
    start = time.monotonic()
    try:
        store = Store(uri)
        start = time.monotonic()
        versions = store.versions()
    except LimbeckError as error:
        yield Check("wrong", "tracking store", error.message, error.fix or "see above")
        return
    took = time.monotonic() - start
    yield Check("ok", "tracking store", f"{redacted(uri)} lists {len(versions)} versions in {took * 1000:.0f} ms")
    yield from _artifacts(store, versions, deep)
    yield from _uploads(store, clean)
    for name in sorted({version.name for version in versions}):
        yield from _aliases(store, name, {v.version for v in versions if v.name == name})


def _packages() -> Iterator[Check]:
    """What pyproject.toml asks for, against what is installed and what Limbeck was tested with."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        asked = [Requirement(text) for text in metadata.requires("limbeck") or []]
    except metadata.PackageNotFoundError:
        yield Check("wrong", "limbeck", "it is not installed", "make install")
        return
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.exists() else []
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines if "==" in line)}
    fine = 0
    for package in asked:
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue
        pin = pins.get(canonicalize_name(package.name))
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            yield Check("wrong", package.name, "not installed", "make install")
            continue
        if not package.specifier.contains(version, prereleases=True):
            yield Check("wrong", package.name, f"{version}, needed is {package.specifier}", "make install")
        elif pin and version.split("+")[0] != pin:
            yield Check("note", package.name, f"{version}; Limbeck was tested with {pin}")
        else:
            fine += 1
    yield Check("ok", "packages", f"{fine} as they were tested")


def _machine() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("ok", "machine", f"{os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory")
    fast = cpu_bf16()
    yield Check("ok", "bf16", f"in hardware ({', '.join(fast)})" if fast else "not in hardware: training is in fp32")
    driver = re.search(r"\d+\.\d+(\.\d+)?", proc("/proc/driver/nvidia/version"))
    yield Check("ok", "CUDA", f"NVIDIA driver {driver[0]}" if driver else "no NVIDIA driver: all runs on the CPU")
    folder = home()
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        yield Check("wrong", "state folder", f"{folder} cannot be written", "set LIMBECK_HOME to a folder that can")
    elif free < LEAST_DISK:
        yield Check("wrong", "state folder", found, "free some space, or move it with LIMBECK_HOME")
    else:
        yield Check("ok", "state folder", found)


def _hub() -> Check:
    """Whether the Hugging Face hub can be asked; nothing is wrong where it cannot."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("note", "hub", "HF_HUB_OFFLINE is set: local and registered models only")
    answers: list[str] = []

    def ask() -> None:
        start = time.monotonic()
        try:
            requests.head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answers.append(f"{constants.ENDPOINT} answers in {(time.monotonic() - start) * 1000:.0f} ms")
        except requests.RequestException:
            return

    # In a thread: looking up a name has no time limit of its own.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answers:
        return Check("ok", "hub", answers[0])
    return Check("note", "hub", f"{constants.ENDPOINT} does not answer: local and registered models only")


def _artifacts(store: Store, versions: list[Version], deep: bool) -> Iterator[Check]:
    """The files of every version: there, and with `deep` those of its digest."""
    damaged = 0
    with progress() as bar:
        task = bar.add_task("verifying" if deep else "looking", total=len(versions), rate="")
        for version in versions:
            try:
                if deep:
                    store.folder(version)
                elif store.is_local(version):
                    _present(version, store.at_hand(version))
            except LimbeckError as error:
                damaged += 1
                yield Check("wrong", version.ref, error.message, error.fix or "register it again")
            bar.advance(task)
    if not damaged:
        how = "their digests verified" if deep else "--deep verifies their digests"
        yield Check("ok", "artifacts", f"the files of all {len(versions)} versions are there; {how}")


def _uploads(store: Store, clean: bool) -> Iterator[Check]:
    """Uploads that never became a version; nobody else sees them."""
    try:
        for each in store.unfinished():
            found = f"begun {each.begun:%Y-%m-%d %H:%M}, never finished, {bytes_said(each.size)}"
            if clean:
                discard(store.client, each.model_id, each.uri)
            after = "taken away" if clean else "register it again to go on, or: limbeck doctor --clean"
            yield Check("note", f"upload of {each.name}", f"{found}; {after}")
    except LimbeckError as error:
        yield Check("wrong", "uploads", error.message, error.fix or "see above")


def _present(version: Version, folder: Path | None) -> None:
    if folder is None:
        raise DamagedArtifact(version.ref, [f"its files are gone from {version.source}"])
    missing = [name for name in read_manifest(folder).get("files", {}) if not (folder / name).is_file()]
    if missing:
        raise DamagedArtifact(version.ref, [f"{name} is missing" for name in missing])


def _aliases(store: Store, name: str, numbers: set[int]) -> Iterator[Check]:
    """The aliases of a model point at something, and are where its ledger says."""
    book = audit.read(store, name)
    problems = book.problems()
    for alias, number in sorted(book.aliases.items()):
        if number not in numbers:
            problems.append(f"{alias} points at version {number}, which Limbeck does not know")
    history = f"limbeck models history {name} --verify"
    for problem in problems:
        yield Check("wrong", f"aliases of {name}", problem, f"look at: {history}")
    if not problems:
        held = [alias for alias in sorted(book.aliases) if stored.protecting(book.entries, alias)]
        aliases = "alias" if len(book.aliases) == 1 else "aliases"
        found = f"{len(book.aliases)} {aliases}, {len(held)} protected by a policy"
        yield Check(
            "ok", f"aliases of {name}", f"{found}; {len(book.entries)} entries in the ledger, each in its place"
        )
    for entry in (last for alias in sorted(book.aliases) if (last := book.last(alias)) and last.override):
        words = f"{entry.alias} is version {entry.to_version} by an override of {entry.who}: {entry.reason}"
        yield Check("note", f"override of {name}", words)
