"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """An error answer of OpenAI's API.

    Attributes:
        status: the HTTP status.
        message: the reason.
        param: the invalid field; None if it is not about one field.
        code: the error code; None for most errors.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
