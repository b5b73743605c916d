"""The list of families is optimum's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from limbeck.export.optimum.model_types import MODEL_TYPES, REFUSED
from limbeck.registry.core.overlay import install_overlay, overlay_environment

LIST = """
import json
import optimum.exporters.onnx.model_configs
from optimum.exporters.tasks import TasksManager
print(json.dumps(TasksManager.get_supported_model_type_for_task("text-generation-with-past", "onnx")))
"""


@pytest.mark.slow
def test_optimum_exports_these_families() -> None:
    environment = overlay_environment(install_overlay(print))
    listed = subprocess.run([sys.executable, "-c", LIST], env=environment, stdout=subprocess.PIPE, check=True)
    assert set(json.loads(listed.stdout)) == MODEL_TYPES | REFUSED
    assert not MODEL_TYPES & REFUSED
