"""The wheel: what is in it, that it lives beside others' packages, and that it runs away from the repository."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import make_model
from tests.limbeck.host_helpers import HOST, distributions_of_host

DATA = [
    "constraints.txt",
    "distill/recipes/shakespeare.toml",
    "evals/cost/prices.toml",
    "evals/leaderboard/page.css",
    "evals/leaderboard/page.js",
    "evals/verdict/page.css",
    "export/bundle/host/Containerfile",
    "export/bundle/host/health",
    "export/bundle/host/start",
    "quickstart/policy.toml",
    "quickstart/recipe.toml",
    "quickstart/teacher/model.safetensors",
    "quickstart/teacher/tokenizer.json",
    "registry/core/optimum-requirements.txt",
    "web/static/limbeck.css",
    "web/templates/base.html",
]
FOREIGN = {"evals/__init__.py": "WHOSE = 'others'\n", "web/__init__.py": "WHOSE = 'others'\n"}


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this process's Python in its environment; it has to end well."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "LIMBECK"))}
    words = list(map(str, command))
    ran = subprocess.run(words, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, f"{' '.join(words)}\n{ran.stdout}{ran.stderr}"
    return ran


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from a copy of the tree, without the network."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "limbeck", tree / "limbeck", symlinks=True)
    for link in (ROOT / "limbeck").iterdir():
        if link.is_symlink() and link.is_dir():
            shutil.copytree(link, tree / link.name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", tree / "dist", tree, cwd=tree)
    (built,) = (tree / "dist").glob("limbeck-*.whl")
    return built


@pytest.fixture(scope="module")
def foreign_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution `evals` that owns the packages `evals` and `web`, as there may be any."""
    info = "evals-1.0.dist-info"
    files = FOREIGN | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: evals\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={digest_of(text.encode())},{len(text)}\n" for name, text in files.items())
    path = tmp_path_factory.mktemp("foreign") / "evals-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def digest_of(content: bytes) -> str:
    """A SHA-256 as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


class Environment:
    """A virtual environment of its own, whose pip is that of this process."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def pip(self, *args: object) -> None:
        quiet = ["--quiet", "--disable-pip-version-check"]
        run(sys.executable, "-m", "pip", "--python", self.python, *args, *quiet, cwd=self.folder)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-compile", wheel)

    def changed_files(self, distribution: str) -> list[str]:
        """The files of a distribution that are not what its RECORD says."""
        (record,) = self.site.glob(f"{distribution}-*.dist-info/RECORD")
        rows = [row for row in csv.reader(record.read_text().splitlines()) if row[1]]
        assert len(rows) >= 4
        return [name for name, digest, _ in rows if not self._is_whole(self.site / name, digest)]

    @staticmethod
    def _is_whole(file: Path, digest: str) -> bool:
        return file.is_file() and f"sha256={digest_of(file.read_bytes())}" == digest


@pytest.fixture(scope="module")
def environment(wheel: Path, foreign_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Limbeck from its wheel beside `evals`; what it depends on comes from this process's environment."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    environment.install(foreign_wheel)
    environment.install(wheel)
    assert environment.changed_files("limbeck") == environment.changed_files("evals") == []
    # A path within a .pth file is no site folder: its own .pth files, the editable install among them, do not run.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (environment.site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return environment


@pytest.fixture(scope="module")
def tiny_export(
    environment: Environment, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A small Llama, exported by the installed command from a folder of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_model(folder / "model", tokenizer_folder, "llama")
    command = [environment.python, "-P", "-m", "limbeck", "export", "model"]
    run(*command, "--precision", "fp32", "--output", "exported", cwd=folder, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return folder / "exported" / "fp32"


def test_the_wheel_has_everything_below_limbeck(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = next(name for name in names if name.endswith("/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert archive.read("limbeck/constraints.txt") == (ROOT / "constraints.txt").read_bytes()
    assert {name.partition("/")[0] for name in names} == {"limbeck", licence.partition("/")[0]}
    assert {f"limbeck/{name}" for name in DATA} <= names
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "limbeck").glob("*.py")}
    rooms = [link for link in (ROOT / "limbeck").iterdir() if link.is_symlink() and link.is_dir()]
    modules |= {f"limbeck/{file.relative_to(ROOT)}" for room in rooms for file in (ROOT / room.name).rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_limbeck_and_a_distribution_of_a_room_s_name_leave_each_other_whole(
    wheel: Path, foreign_wheel: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    environment.install(foreign_wheel)
    assert environment.changed_files("limbeck") == environment.changed_files("evals") == []
    environment.pip("uninstall", "--yes", "evals")
    assert environment.changed_files("limbeck") == []
    assert not (environment.site / "evals").exists()
    environment.install(foreign_wheel)
    environment.pip("uninstall", "--yes", "limbeck")
    assert environment.changed_files("evals") == []
    assert not (environment.site / "limbeck").exists()


def test_the_installed_command_runs_away_from_the_repository(environment: Environment, tmp_path: Path) -> None:
    where = "import limbeck, limbeck.evals, evals, web; print(limbeck.__file__, limbeck.evals.__file__, evals.WHOSE)"
    ours, room, whose = run(environment.python, "-P", "-c", where, cwd=tmp_path).stdout.split()
    assert Path(ours).parent == environment.site / "limbeck"
    assert (Path(room).parent, whose) == (environment.site / "limbeck" / "evals", "others")
    command = environment.folder / "bin" / "limbeck"
    assert "quickstart" in run(command, "--help", cwd=tmp_path).stdout
    doctor = run(command, "doctor", "--format", "json", cwd=tmp_path, HF_HUB_OFFLINE="1")
    found = {check["subject"]: check["found"] for check in json.loads(doctor.stdout)}
    assert "have the tested version" in found["packages"]


def test_an_export_of_the_installed_command_runs_on_a_serving_host(
    environment: Environment, tiny_export: Path, tmp_path: Path
) -> None:
    """With `limbeck[serve]` alone: neither torch nor MLflow can be imported."""
    (tmp_path / "sitecustomize.py").write_text(HOST)
    allowed = {"PYTHONPATH": str(tmp_path), "ALLOWED": " ".join(distributions_of_host("serve"))}
    python = [environment.python, "-P", "-m", "limbeck"]
    done = run(*python, "generate", tiny_export, "def ", "--max-new-tokens", 4, cwd=tmp_path, **allowed)
    assert done.stdout.strip()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [*map(str, python), "serve", str(tiny_export), "--port", "0"]
    server = subprocess.Popen(command, cwd=tmp_path, env=kept | allowed, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        first = server.stderr.readline()
        assert " at http" in first, first + server.stderr.read()
        health = first.split(" at ")[1].strip().removesuffix("/v1") + "/health"
        with urllib.request.urlopen(health, timeout=30) as answer:
            assert json.load(answer) == {"status": "ok"}
    finally:
        server.kill()
        server.communicate()


def test_the_installed_command_writes_a_bundle(environment: Environment, tiny_export: Path, tmp_path: Path) -> None:
    command = [environment.python, "-P", "-m", "limbeck", "deploy", tiny_export, "--output", tmp_path / "bundle"]
    run(*command, "--no-hashes", cwd=tmp_path)
    assert (tmp_path / "bundle" / "lib" / "limbeck" / "export" / "server" / "app.py").is_file()
    assert os.access(tmp_path / "bundle" / "start", os.X_OK)
