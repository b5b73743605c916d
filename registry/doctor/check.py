"""The result of a check, and a fault that may be mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from limbeck.registry.core.errors import LimbeckError

REPAIR = "limbeck doctor --repair"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    state: Literal["ok", "note", "wrong"]  # note: works, but worth knowing
    subject: str
    found: str
    fix: str | None = None  # what to do if it is wrong

    def json(self) -> dict[str, Any]:
        """`{state, subject, found, fix}`."""
        return asdict(self)


class Fault(NamedTuple):
    """Something that was deleted, renamed or moved, and how to mend it."""

    subject: str
    found: str
    mending: str  # what `mend` does, such as "restore it"; without `mend`, what the user can do
    mend: Callable[[], object] | None = None
    is_wrong: bool = True  # else it is worth knowing, and nothing can be done

    def check(self, *, repair: bool) -> Check:
        """The check of this fault, mended if `repair` and possible."""
        if self.mend is None:
            if not self.is_wrong:
                return Check("note", self.subject, self.found)
            return Check("wrong", self.subject, self.found, self.mending)
        if not repair:
            return Check("wrong", self.subject, self.found, f"{self.mending}: {REPAIR}")
        try:
            self.mend()
        except LimbeckError as error:
            return Check("wrong", self.subject, f"{self.found}; not mended: {error.message}", error.fix or "see above")
        return Check("note", self.subject, f"{self.found}; done: {self.mending}")
