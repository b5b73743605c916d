"""The hashes of the packages in requirements.txt, from an index of small wheels."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from limbeck.export.bundle.hashes import with_hashes
from limbeck.export.bundle.vendor import pinned_requirements
from limbeck.export.bundle.write import write_bundle
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import Exported


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where pip finds the packages that a bundle needs."""
    folder = tmp_path / "index"
    folder.mkdir()
    for pin in pinned_requirements():
        name, _, version = pin.partition("==")
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            info = f"{stem}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for setting, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{setting}", value)
    return folder


def test_pip_accepts_only_the_files_with_the_hashes_of_a_bundle(llama: Exported, index: Path, tmp_path: Path) -> None:
    write_bundle(llama.fp32, tmp_path / "bundle", hashes=True)
    requirements = tmp_path / "bundle" / "requirements.txt"
    lines = requirements.read_text().splitlines()
    assert lines[0].startswith("# Python 3")
    assert [line.split()[0] for line in lines[1:]] == pinned_requirements()
    wheels = {hashlib.sha256(path.read_bytes()).hexdigest() for path in index.iterdir()}
    assert {line.partition("--hash=sha256:")[2] for line in lines[1:]} == wheels
    with zipfile.ZipFile(next(index.glob("uvicorn-*")), "a") as wheel:
        wheel.writestr("uvicorn/extra.py", "")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert "uvicorn" in done.stderr


def test_packages_that_pip_does_not_find_are_bad_input(index: Path) -> None:
    with pytest.raises(BadInput, match=r"pip does not find .*nothing-at-all==1") as refused:
        with_hashes(["nothing-at-all==1"])
    assert "--no-hashes" in str(refused.value.fix)
