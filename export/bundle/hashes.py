"""The hashes of the packages in a bundle's requirements, as pip finds the packages on its index."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from packaging.utils import canonicalize_name

from limbeck.registry.core.errors import BadInput

PIP_S = 600  # the longest that pip may take; packages whose index has no metadata are downloaded


def with_hashes(pins: Sequence[str]) -> list[str]:
    """Add the SHA-256 of the file that pip would install here to each "name==version": pip then accepts no other.

    A host of another platform or Python needs other files. pip reads its own settings (PIP_INDEX_URL and others).

    Raises BadInput if pip does not find them all.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    try:
        done = subprocess.run([*command, "--quiet", *pins], capture_output=True, text=True, timeout=PIP_S)
        problem = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"it took longer than {PIP_S} s"
    if problem:
        raise BadInput(
            f"pip does not find the packages that the bundle needs, for their hashes: {problem}",
            fix="let pip reach its index, or give --no-hashes",
        )
    hashes = {
        canonicalize_name(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in json.loads(done.stdout)["install"]
    }
    return [f"{pin} --hash=sha256:{hashes[canonicalize_name(pin.partition('==')[0])]}" for pin in pins]
