"""The modules and packages in a bundle."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from limbeck.export.bundle.vendor import pinned_requirements, source_files


def test_a_bundle_has_the_modules_and_packages_of_a_server_and_no_others(shared_bundle: Path) -> None:
    names = {
        path.relative_to(shared_bundle / "lib").as_posix()
        for path in (shared_bundle / "lib").rglob("*")
        if path.is_file()
    }
    assert names == set(source_files())
    needed = ("__main__.py", "cli.py", "export/server/app.py", "export/runtime/batch.py", "registry/core/digest.py")
    assert {f"limbeck/{name}" for name in needed} <= names
    assert {f"limbeck/{name}__init__.py" for name in ("", "export/", "export/server/", "registry/")} <= names
    absent = (
        "export/artifact",
        "export/graph",
        "export/commands/export.py",
        "export/bundle/write.py",
        "registry/catalog",
        "registry/mlflow",
        "registry/records",
    )
    assert not [name for name in names if name.startswith(tuple(f"limbeck/{path}" for path in absent))]
    pins = dict(pin.split("==") for pin in pinned_requirements())
    # Direct imports, and their requirements.
    assert {"onnxruntime", "numpy", "tokenizers", "uvicorn", "h11", "markupsafe", "pydantic-core"} <= set(pins)
    assert not set(pins) & {"torch", "transformers", "mlflow", "onnx", "optimum", "datasets", "scipy", "rich"}

    assert pins["onnxruntime"] == onnxruntime.__version__
    lines = (shared_bundle / "requirements.txt").read_text().splitlines()
    assert lines[1:] == pinned_requirements()
