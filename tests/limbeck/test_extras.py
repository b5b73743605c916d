"""The extras: each brings what its room imports, and a command says which one is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from limbeck.cli import EXTRAS, missing_package
from limbeck.registry.core.extras import distribution_of_module, install_command, packages_of_extras
from limbeck.registry.core.overlay import overlay_versions
from limbeck.registry.doctor.checks import read_tested_versions
from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.limbeck.host_helpers import distributions_of_host, run_limbeck_on_host, run_on_host

CHECKPOINTS = ROOT / "registry" / "checkpoints"
ROOMS = {"limbeck", "registry", *(name.split(".")[1] for name in EXTRAS)}


def imported_distributions(room: str) -> set[str]:
    """What pip calls the packages that the files of a room import, at the top or within a function.

    Checkpoints are loaded by the commands of other rooms, whose extras bring what that needs.
    """
    files = (ROOT / room).glob("*.py") if room == "limbeck" else (ROOT / room).rglob("*.py")
    return _distributions(file for file in files if room != "registry" or CHECKPOINTS not in file.parents)


def _distributions(files: Iterable[Path]) -> set[str]:
    modules = {name for file in files for name in _imports(ast.parse(file.read_text()))}
    others = {name for name in modules if name.partition(".")[0] not in {*sys.stdlib_module_names, "limbeck"}}
    return {found for name in others if (found := distribution_of_module(name) or _distribution_of_part(name))}


def _distribution_of_part(name: str) -> str | None:
    return distribution_of_module(name.partition(".")[0])


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_an_extra_brings_what_its_room_imports(room: str) -> None:
    packages = packages_of_extras()
    brought = packages[""] | packages.get(EXTRAS.get(f"limbeck.{room}", ""), set())
    brought |= packages["ray"]  # distill --ray asks for it by name
    if room == "export":
        brought |= set(overlay_versions())  # its worker.py runs over the overlay
    assert imported_distributions(room) <= brought


@pytest.mark.parametrize("extra", ["train", "eval", "export"])
def test_what_loads_models_brings_what_checkpoints_need(extra: str) -> None:
    packages = packages_of_extras()
    assert _distributions(CHECKPOINTS.rglob("*.py")) | {"accelerate", "gguf"} <= packages[""] | packages[extra]


IMPORT_ROOM = """
import importlib, pkgutil, sys
room = importlib.import_module(f"limbeck.{sys.argv[1]}")
for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
    importlib.import_module(found.name)
"""


@pytest.mark.parametrize("room", sorted(ROOMS - {"limbeck"}))
def test_a_room_can_be_imported_with_its_extra_alone(room: str, tmp_path: Path) -> None:
    """What it imports of other rooms is in the extra too."""
    allowed = distributions_of_host(EXTRAS[f"limbeck.{room}"])
    ran = run_on_host(tmp_path, allowed, "-c", IMPORT_ROOM, room)
    assert ran.returncode == 0, ran.stderr


def test_a_lower_bound_is_the_version_that_was_tested() -> None:
    pins = read_tested_versions()
    for asked in map(Requirement, metadata.requires("limbeck") or []):
        pin = pins.get(canonicalize_name(asked.name))
        if pin:
            tested = ".".join(pin.split(".")[:2])
            assert f">={tested}" in [str(each) for each in asked.specifier], f"{asked} was tested with {pin}"


def test_a_serving_host_has_no_torch_and_no_mlflow() -> None:
    host = distributions_of_host("serve")
    assert not host & {"mlflow", "torch", "transformers", "onnx", "optimum", "lm-eval", "datasets", "scipy", "pandas"}
    assert {"onnxruntime", "fastapi", "tokenizers"} <= host


CASES = [
    (["eval", "model", "--tasks", "t"], "lm_eval", "limbeck[eval]"),
    (["distill", "recipe.toml", "--check"], "torch", "limbeck[train]"),
    (["models", "list"], "mlflow", "limbeck[registry]"),
    (["serve", "model"], "onnxruntime", "limbeck[serve]"),
    (["generate", "model", "x"], "onnxruntime", "limbeck[export]"),
    (["ui"], "fastapi", "limbeck[web]"),
]


@pytest.mark.parametrize(("args", "module", "install"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_a_command_whose_package_is_missing_names_its_extra(
    args: list[str], module: str, install: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for name, text in {"model.onnx": "", "config.json": "{}", "tokenizer.json": "{}"}.items():
        (tmp_path / "model" / name).write_text(text)
    hidden = {canonicalize_name(owner) for owner in metadata.packages_distributions()[module]}
    ran = run_limbeck_on_host(tmp_path, distributions_of_host("all") - hidden, *args)
    command = " ".join(["limbeck", *args[: 2 if args[0] == "models" else 1]])
    line = f"error: `{command}` needs {module}, which is not installed: pip install '{install}'\n"
    assert (ran.returncode, ran.stderr) == (2, line)


def test_following_an_alias_names_the_extra_that_asks_the_registry(tmp_path: Path) -> None:
    ran = run_limbeck_on_host(tmp_path, distributions_of_host("serve"), "serve", "coder@production")
    assert ran.returncode == 2
    assert ran.stderr == "error: No module named 'mlflow'\n  pip install 'limbeck[registry]'\n"


def test_a_module_of_our_own_that_is_missing_is_a_traceback(tmp_path: Path) -> None:
    code = "import sys; sys.modules['limbeck.registry.commands.doctor'] = None; from limbeck.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "ModuleNotFoundError" in ran.stderr
    assert missing_package(["doctor"], "limbeck.registry.absent") is None
    assert missing_package(["doctor"], "no_dependency_of_ours") is None
    assert missing_package(["eval"], "torch.absent") is None  # the package is there, so this is a fault in it


def test_the_extra_is_that_of_the_command_if_it_brings_the_package() -> None:
    assert install_command("torch", "eval") == "pip install 'limbeck[eval]'"
    assert install_command("yaml", "export") == "pip install 'limbeck[eval]'"
    assert install_command("ray", "train") == "pip install 'limbeck[ray]'"
    assert install_command("click", "serve") == "pip install limbeck"


def test_doctor_on_a_machine_with_the_command_line_alone(store: Store, limbeck_home: Path, tmp_path: Path) -> None:
    limbeck_home.rename(tmp_path / ".limbeck")
    ran = run_limbeck_on_host(tmp_path, distributions_of_host(), "doctor")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "lists 0 versions" in ran.stdout
    assert "mlflow is not installed; to install: pip install 'limbeck[registry]'" in ran.stdout
