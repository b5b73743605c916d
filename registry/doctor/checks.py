"""`limbeck doctor`: checks what is installed, what is reachable, and what is registered."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import DamagedArtifact, LimbeckError, redact_urls
from limbeck.registry.core.extras import canonical_name, install_command, packages_of_extras
from limbeck.registry.core.home import home, tracking_uri
from limbeck.registry.core.machine import cpu_bf16_flags, read_proc_file
from limbeck.registry.core.overlay import INSTALL_COMMAND, find_overlay, overlay_versions
from limbeck.registry.core.terminal import format_bytes, progress_bar
from limbeck.registry.doctor.check import Check, Fault
from limbeck.registry.doctor.housekeeping import faults
from limbeck.registry.gate import audit
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.transfer import discard_upload
from limbeck.registry.policy import stored
from limbeck.registry.records import Version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CONSTRAINTS = files("limbeck") / "constraints.txt"  # a link in a source tree, a file in a wheel
FOR_DEVELOPERS = {"bench", "dev"}  # extras that only developers of Limbeck need
LEAST_DISK = 2**30  # bytes
HUB_SECONDS = 3.0


def run_checks(*, deep: bool = False, clean: bool = False, repair: bool = False) -> Iterator[Check]:
    """Run all checks; after one that fails, the next ones still run.

    Args:
        deep: verify the digest of every version's files; from a server they are downloaded.
        clean: delete the uploads that no command resumed for a day, and the files of deleted versions.
        repair: mend what can be mended of what was deleted, renamed or moved.
    """
    yield Check("ok", "python", f"{platform.python_version()} at {sys.executable}")
    yield from _packages()
    yield _optimum()
    yield from _machine()
    yield _hub()
    try:
        yield from _registry(deep, clean, repair)
    except ModuleNotFoundError as error:
        yield Check("note", "registry", _not_checked(error))


def _registry(deep: bool, clean: bool, repair: bool) -> Iterator[Check]:
    """The tracking store, and what is registered there."""
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Check("note", "tracking store", f"{uri} does not exist yet; the first command that needs it creates it")
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
    yield Check("ok", "tracking store", f"{redact_urls(uri)} lists {len(versions)} versions in {took * 1000:.0f} ms")
    for fault in faults(store):
        yield fault.check(repair=repair)
    versions = store.versions()
    yield from _artifacts(store, versions, deep, repair)
    yield from _uploads(store, clean)
    for name in sorted({version.name for version in versions}):
        yield from _aliases(store, name, {v.version for v in versions if v.name == name})


def _packages() -> Iterator[Check]:
    """Compare the installed packages with those that Limbeck and its extras require, and with the tested versions."""
    try:
        extras = _requirements_of_extras()
    except metadata.PackageNotFoundError:
        yield Check("wrong", "limbeck", "it is not installed", "make install")
        return
    pins = read_tested_versions()
    missing = {extra: [r for r in requirements if _version(r) is None] for extra, requirements in extras.items()}
    for extra, absent in missing.items():
        yield from _missing(extra, absent)
    seen: set[str] = set()
    tested = 0
    for extra in sorted(
        extras, key=lambda extra: bool(missing[extra])
    ):  # complete extras first: their misfits are wrong
        for requirement in extras[extra]:
            version = _version(requirement)
            if version is None or requirement.name in seen:
                continue
            seen.add(requirement.name)
            pin = pins.get(canonical_name(requirement.name))
            tested += version.split("+")[0] == pin
            yield from _misfit(requirement, version, pin, needed=not extra or not missing[extra])
    if pins:
        yield Check("ok", "packages", f"{tested} of {len(seen)} have the tested version")
    else:
        unknown = "the tested versions are unknown: constraints.txt is missing"
        yield Check("note", "packages", f"{len(seen)} are installed; {unknown}")


def read_tested_versions() -> dict[str, str]:
    """Package -> the version that Limbeck was tested with; empty if constraints.txt is missing."""
    try:
        lines = CONSTRAINTS.read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {canonical_name(name): pin for name, pin in (line.split("==") for line in lines if "==" in line)}


def _requirements_of_extras() -> dict[str, list[Requirement]]:
    """Extra -> the packages that it lists, "" -> those always required; without extras for developers."""
    from packaging.requirements import Requirement

    found: dict[str, list[Requirement]] = {}
    known = packages_of_extras().keys() - FOR_DEVELOPERS
    for requirement in map(Requirement, metadata.requires("limbeck") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found.setdefault("", []).append(requirement)
            continue
        for extra in known:
            if requirement.name != "limbeck" and marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(requirement)
    return found


def _version(requirement: Requirement) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def _missing(extra: str, absent: list[Requirement]) -> Iterator[Check]:
    """Report missing packages: wrong if Limbeck always requires them, a note if an extra does."""
    if extra and absent:
        names = ", ".join(requirement.name for requirement in absent)
        yield Check("note", f"extra {extra}", f"not installed: {names}; to install: pip install 'limbeck[{extra}]'")
        return
    for requirement in absent:
        yield Check(
            "wrong", requirement.name, "not installed", f"pip install '{requirement.name}{requirement.specifier}'"
        )


def _misfit(requirement: Requirement, version: str, pin: str | None, *, needed: bool) -> Iterator[Check]:
    """Report a version that does not fit or was not tested; wrong only if `needed`: its extra is complete."""
    if not requirement.specifier.contains(version, prereleases=True):
        found, fix = (
            f"{version}, required is {requirement.specifier}",
            f"pip install '{requirement.name}{requirement.specifier}'",
        )
        yield Check("wrong", requirement.name, found, fix) if needed else Check("note", requirement.name, found)
    elif pin and version.split("+")[0] != pin:
        yield Check("note", requirement.name, f"{version}; Limbeck was tested with {pin}")


def _optimum() -> Check:
    """Whether the export engine optimum is installed; a note if not, since most models need the other engine only."""
    folder = find_overlay()
    if folder is None:
        return Check("note", "optimum", f"not installed; exports that need it install it, or: {INSTALL_COMMAND}")
    packages = ", ".join(f"{name} {overlay_versions()[name]}" for name in ("optimum-onnx", "transformers"))
    return Check("ok", "optimum", f"{packages} in {folder}")


def _machine() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("ok", "machine", f"{os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory")
    fast = cpu_bf16_flags()
    yield Check("ok", "bf16", f"in hardware ({', '.join(fast)})" if fast else "not in hardware: training is in fp32")
    driver = re.search(r"\d+\.\d+(\.\d+)?", read_proc_file("/proc/driver/nvidia/version"))
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
    """Whether the Hugging Face hub answers; a note if it does not."""
    try:
        import requests
        from huggingface_hub import constants
    except ModuleNotFoundError as error:
        return Check("note", "hub", _not_checked(error))
    if constants.HF_HUB_OFFLINE:
        return Check("note", "hub", "HF_HUB_OFFLINE is set: local and registered models only")
    answers: list[str] = []

    def request() -> None:
        start = time.monotonic()
        try:
            requests.head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answers.append(f"{constants.ENDPOINT} answers in {(time.monotonic() - start) * 1000:.0f} ms")
        except requests.RequestException:
            return

    # In a thread, since the lookup of a name has no timeout.
    thread = Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answers:
        return Check("ok", "hub", answers[0])
    return Check("note", "hub", f"{constants.ENDPOINT} does not answer: local and registered models only")


def _not_checked(error: ModuleNotFoundError) -> str:
    """The text of a check whose package is missing. Raises `error` if no extra provides the package."""
    install = install_command(error.name or "", "registry")
    if install is None:
        raise error
    return f"not checked: {error.name} is not installed; to install: {install}"


def _artifacts(store: Store, versions: list[Version], deep: bool, repair: bool) -> Iterator[Check]:
    """Check that the files of every version exist, and with `deep` that they match its digest."""
    damaged = 0
    with progress_bar() as bar:
        task = bar.add_task("verifying" if deep else "checking", total=len(versions), rate="")
        for version in versions:
            try:
                if deep:
                    store.artifacts.verified_folder(version)
                elif store.artifacts.is_local(version):
                    _check_files_present(version, store.artifacts.find_local_folder(version))
            except LimbeckError as error:
                check = _damaged(store, version, versions, error).check(repair=repair)
                damaged += check.state == "wrong"
                yield check
            bar.advance(task)
    if not damaged:
        digests = "their digests verified" if deep else "--deep verifies their digests"
        yield Check("ok", "artifacts", f"the files of all {len(versions)} versions are there; {digests}")


def _damaged(store: Store, version: Version, versions: list[Version], error: LimbeckError) -> Fault:
    """The fault of a version whose files are gone or changed. Another version with the same files mends it."""
    for other in versions:
        if other.digest == version.digest and other.source != version.source:
            with suppress(LimbeckError):
                folder = store.artifacts.verified_folder(other)
                mend = partial(store.artifacts.upload, folder, version.source, version)
                return Fault(version.ref, error.message, f"copy the same files from {other.ref}", mend)
    return Fault(version.ref, error.message, error.fix or "register it again")


def _uploads(store: Store, clean: bool) -> Iterator[Check]:
    """Report the uploads that are no version, or no more; no other command shows them."""
    try:
        for each in store.unfinished_uploads():
            begun = f"begun {each.started_at:%Y-%m-%d %H:%M}, never finished"
            found = f"{'of a deleted version' if each.is_complete else begun}, {format_bytes(each.size)}"
            if clean:
                discard_upload(store.client, each.model_id, each.uri)
            after = "deleted" if clean else "register it again to resume it, or delete it: limbeck doctor --clean"
            yield Check("note", f"upload of {each.name}", f"{found}; {after}")
    except LimbeckError as error:
        yield Check("wrong", "uploads", error.message, error.fix or "see above")


def _check_files_present(version: Version, folder: Path | None) -> None:
    if folder is None:
        raise DamagedArtifact(version.ref, [f"its files are gone from {version.source}"])
    missing = [name for name in read_manifest(folder).get("files", {}) if not (folder / name).is_file()]
    if missing:
        raise DamagedArtifact(version.ref, [f"{name} is missing" for name in missing])


def _aliases(store: Store, name: str, numbers: set[int]) -> Iterator[Check]:
    """Check that the aliases of a model point at existing versions, where its ledger says."""
    ledger = audit.audit_ledger(store, name)
    problems = ledger.problems()
    for alias, number in sorted(ledger.aliases.items()):
        if number not in numbers:
            problems.append(f"{alias} points at version {number}, which Limbeck did not register")
    history = f"limbeck models history {name} --verify"
    for problem in problems:
        yield Check("wrong", f"aliases of {name}", problem, f"look at: {history}")
    if not problems:
        protected = [alias for alias in sorted(ledger.aliases) if stored.protection_entry(ledger.entries, alias)]
        aliases = "alias" if len(ledger.aliases) == 1 else "aliases"
        found = f"{len(ledger.aliases)} {aliases}, {len(protected)} protected by a policy"
        yield Check("ok", f"aliases of {name}", f"{found}; {len(ledger.entries)} entries in the ledger, all valid")
    for alias in sorted(ledger.aliases):
        last = ledger.last_move(alias)
        if last and last.override:
            found = f"{alias} is version {last.to_version} by an override of {last.who}: {last.reason}"
            yield Check("note", f"override of {name}", found)
