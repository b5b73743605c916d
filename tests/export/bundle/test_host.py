"""A bundle as its host runs it: without torch, MLflow or a checkout of Limbeck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.export.bundle.vendor import pinned_requirements
from limbeck.export.bundle.write import write_bundle
from limbeck.export.runtime.runtime import Runtime
from tests.export.export_helpers import Exported

# Makes a process see only the installed packages that requirements.txt pins, and Limbeck only in the bundle.
HOST = """
import importlib.abc, importlib.metadata, os, sys
allowed = set(os.environ["ALLOWED"].split())
ours = {"limbeck"}
installed = importlib.metadata.packages_distributions()
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        owners = {d.lower().replace("_", "-").replace(".", "-") for d in installed.get(top, ())}
        if top not in ours and top not in sys.stdlib_module_names and owners and not owners & allowed:
            raise ModuleNotFoundError(f"{name} is not on this host", name=name)
        return None
sys.meta_path.insert(0, Absent())
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a process on a serving host."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(HOST)
    allowed = " ".join(pin.split("==")[0] for pin in pinned_requirements())
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return inherited | {"PYTHON": sys.executable, "PYTHONPATH": str(site), "ALLOWED": allowed, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bundle(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose path has a space."""
    folder = tmp_path_factory.mktemp("host") / "a bundle"
    write_bundle(llama.fp32, folder, manifest_fields={"model": "coder/3"})
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path, host: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """Run `./start` from another folder, through a link. Yields the process and its address."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "limbeck.py").write_text("raise SystemExit('the wrong Limbeck')")
    (elsewhere / "link").symlink_to(bundle / "start")
    command = ["./link", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, cwd=elsewhere, env=host, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert " at http" in first, first + process.stderr.read()
        yield process, first.split(" at ")[1].strip().removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


def test_it_starts_completes_reports_its_health_and_stops(
    server: tuple[subprocess.Popen[str], str], bundle: Path, host: dict[str, str], runtime: Runtime
) -> None:
    process, address = server
    body = json.dumps({"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        done = json.load(answer)
    assert done["model"] == "coder/3"
    assert done["choices"][0]["text"] == runtime.generate(["def add(a, b):"], max_new_tokens=8)[0].text
    health_command = [str(bundle / "health"), f"{address}/health"]
    healthy = subprocess.run(health_command, env=host, capture_output=True, text=True, timeout=30)
    assert (healthy.returncode, json.loads(healthy.stdout)) == (0, {"status": "ok"})
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) in (0, -signal.SIGTERM)
    gone = subprocess.run(health_command, env=host, capture_output=True, text=True, timeout=30)
    assert gone.returncode == 1
    assert address in gone.stderr
    assert not list(bundle.rglob("__pycache__"))  # Python wrote no caches


def test_the_host_has_no_other_packages(host: dict[str, str]) -> None:
    code = "import numpy, tokenizers, fastapi\nfor name in ('torch', 'mlflow', 'onnx', 'scipy', 'limbeck'):\n"
    code += "    try: __import__(name)\n    except ModuleNotFoundError: print(name)"
    ran = subprocess.run([sys.executable, "-P", "-c", code], env=host, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["torch", "mlflow", "onnx", "scipy", "limbeck"], ran.stderr


@pytest.mark.parametrize("damaged", ["lib/limbeck/export/runtime/sampling.py", "limbeck.json"])
def test_a_damaged_bundle_does_not_start(bundle: Path, host: dict[str, str], damaged: str, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    if damaged.endswith(".py"):
        with open(copy / damaged, "a") as file:
            file.write("# more\n")
    else:
        (copy / damaged).unlink()
    ran = subprocess.run([copy / "start", "--port", "0"], env=host, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    message = f"{damaged} has sha256" if damaged.endswith(".py") else "is not a bundle, and this host has no registry"
    assert message in ran.stderr
