"""The overlay: where it lies, that pip installs it once and as a whole, and what a process over it imports."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.overlay import (
    find_overlay,
    install_overlay,
    overlay_environment,
    overlay_versions,
)


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment and a cache without an overlay; pip reaches no index."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "environment"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small wheels of the names and versions of the overlay, for pip to find."""
    (tmp_path / "wheels").mkdir()
    for package, version in overlay_versions().items():
        name = package.replace("-", "_")
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.mark.usefixtures("wheels")
def test_it_is_installed_once_in_the_environment_with_a_line_that_says_so(prefix: Path) -> None:
    assert find_overlay() is None
    lines: list[str] = []
    folder = install_overlay(lines.append)
    assert folder.parent == prefix / "share" / "limbeck"
    assert (folder / "transformers" / "__init__.py").is_file()
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert all(f"{name} {version}" in lines[0] for name, version in overlay_versions().items())
    assert install_overlay(lines.append) == find_overlay() == folder
    assert len(lines) == 1


@pytest.mark.usefixtures("wheels")
def test_it_is_in_the_cache_if_the_environment_cannot_be_written(prefix: Path, tmp_path: Path) -> None:
    prefix.write_text("a file: nothing can be created in it")
    assert install_overlay(print).parent == tmp_path / "cache" / "limbeck"


def test_without_a_network_the_error_names_the_command_and_nothing_is_left(prefix: Path) -> None:
    with pytest.raises(BadInput, match="No matching distribution found") as failed:
        install_overlay(print)
    assert "limbeck doctor --install-optimum" in str(failed.value.fix)
    assert find_overlay() is None
    assert not list((prefix / "share" / "limbeck").glob("*optimum*.part"))


def test_a_process_imports_the_overlay_first_and_is_not_led_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("overlay", "other", "current"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "optimum.py").write_text(f"print({folder!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path / "current")
    command = [sys.executable, "-c", "import optimum, numpy"]
    environment = overlay_environment(tmp_path / "overlay")
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "overlay\n"
