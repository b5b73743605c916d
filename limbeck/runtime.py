"""Run an exported artifact without torch: `Runtime.load(FOLDER).generate([PROMPT])`."""

from limbeck.export.runtime.runtime import Runtime

__all__ = ["Runtime"]
