"""The errors that a user sees, each with the exit code of the command."""

from __future__ import annotations

import re
from pathlib import Path

SECRET = re.compile(r"(?<=://)[^/\s]*(?=@)|(?<=[?&]password=)[^&\s]+")  # user and password in an address


def redact_urls(text: str) -> str:
    """A text with user and password removed from its addresses: `http://***@host/`."""
    return SECRET.sub("***", text)


def escape_unprintable(text: str) -> str:
    """A text with control characters as escapes, so that a text from outside cannot rewrite the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class LimbeckError(Exception):
    """A problem that is printed without a traceback.

    Args:
        message: what was wrong and where. Passwords in addresses are removed from it and from `fix`, and control
            characters are written as escapes.
        fix: what to do next; printed on its own line.
    """

    exit_code = 2

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = escape_unprintable(redact_urls(message))
        self.fix = escape_unprintable(redact_urls(fix)) if fix else fix
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  {self.fix}"


class BadInput(LimbeckError):
    """An option, recipe, policy, folder or name that cannot be used (exit code 2)."""


class DamagedArtifact(LimbeckError):
    """Files that do not match their digest (exit code 2)."""

    def __init__(self, folder: Path | str, details: list[str]) -> None:
        super().__init__(
            f"{folder} is damaged: " + "; ".join(details),
            fix="make it again, or fetch it again from its source",
        )


class Unreachable(LimbeckError):
    """A tracking server, hub or endpoint does not answer (exit code 2)."""


class Refused(LimbeckError):
    """A gate or a check did not pass (exit code 1)."""

    exit_code = 1
