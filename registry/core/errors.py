"""What can go wrong, in words for the user. Each error carries the exit code of the command."""

from __future__ import annotations

import re
from pathlib import Path

SECRET = re.compile(r"(?<=://)[^/\s]*(?=@)|(?<=[?&]password=)[^&\s]+")  # of an address


def redact_urls(text: str) -> str:
    """A text whose addresses say neither user nor password: `http://***@host/`."""
    return SECRET.sub("***", text)


def escape_unprintable(text: str) -> str:
    """Somebody else's text without the control characters that could rewrite the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class LimbeckError(Exception):
    """A problem to be told to the user without a traceback.

    Args:
        message: what was wrong and where. Passwords in addresses are taken out of it and of `fix`, and control
            characters are written as escapes.
        fix: what to do about it; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = escape_unprintable(redact_urls(message))
        self.fix = escape_unprintable(redact_urls(fix)) if fix else fix
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  {self.fix}"


class BadInput(LimbeckError):
    """A flag, recipe, policy, folder or name that cannot be used (exit code 2)."""


class DamagedArtifact(LimbeckError):
    """Files that are not those their digest was taken of (exit code 2)."""

    def __init__(self, folder: Path | str, details: list[str]) -> None:
        super().__init__(
            f"{folder} is damaged: " + "; ".join(details),
            fix="make it again, or fetch it again from where it came",
        )


class Unreachable(LimbeckError):
    """A tracking server, hub or endpoint that does not answer (exit code 2)."""


class Refused(LimbeckError):
    """A gate or check that said no (exit code 1)."""

    exit_code = 1
