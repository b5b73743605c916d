"""Access control of the pages: token, sessions, CSRF and DNS rebinding.

On loopback everybody can read. A change needs a session (the login form gives one for the token), the CSRF value of
that session in the form, and a request from these pages. The token is never part of an address.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.registry.core.errors import BadInput, Refused

SESSION_S = 12 * 3600
MAX_TRIES, TRY_WINDOW_S = 5, 60.0  # at most 5 wrong tokens from one address within 60 s
MIN_TOKEN_LENGTH = 16  # characters
MAX_FORM = 2**16  # bytes
OPEN_PATHS = ("/login", "/static/")  # readable without a session even if the pages are private
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    # Not "no-referrer": browsers would send `Origin: null` with the forms of these pages.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class NotLoggedIn(Refused):
    """There is no session, it has expired, or the form belongs to another session."""


@dataclass(frozen=True)
class Session:
    """A visitor who has logged in."""

    nonce: str
    expires: int  # seconds since the epoch
    csrf: str  # the hidden field of this session's forms


class Guard:
    """The token and the sessions of one running server. Sessions end with the process. Thread-safe.

    Args:
        token: what the login form asks for; None: nobody can log in, so nothing can be changed.
        hosts: host names of the pages, besides IP addresses, localhost and this machine's name.
        private: reading needs a session too.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self,
        token: str | None,
        *,
        hosts: Iterable[str] = (),
        private: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.token = token
        self.private = private
        self.once_per_form = OncePerForm()
        self._hosts = {host.lower() for host in (*hosts, "localhost", socket.gethostname(), socket.getfqdn())}
        self._now = clock
        self._key = secrets.token_bytes(32)
        # The ports of a host share their cookies, so each server needs its own name.
        self.cookie = f"limbeck-{secrets.token_hex(4)}"
        self._logged_out: dict[str, int] = {}  # nonce of a session that was logged out -> its expiry
        self._wrong_tokens: dict[str, deque[float]] = {}  # address -> times of wrong tokens
        self._lock = threading.Lock()

    # --- sessions

    def log_in(self, token: str, address: str) -> str:
        """Start a session and return its cookie.

        Args:
            token: as typed by the visitor.
            address: of the client; after too many wrong tokens it has to wait.

        Raises:
            Refused: a wrong token, or too many of them.
        """
        with self._lock:
            wrong = self._wrong_tokens.setdefault(address, deque(maxlen=MAX_TRIES))
            wait = wrong[0] + TRY_WINDOW_S - self._now() if len(wrong) == MAX_TRIES else 0
            if wait > 0:
                raise Refused(
                    f"{MAX_TRIES} wrong tokens within a minute", fix=f"wait {wait:.0f} seconds, then try again"
                )
            if self.token is None or not hmac.compare_digest(token.strip().encode(), self.token.encode()):
                wrong.append(self._now())
                if len(self._wrong_tokens) > 1000:
                    self._wrong_tokens.pop(next(iter(self._wrong_tokens)))
                raise Refused("wrong token")
            self._wrong_tokens.pop(address)
        value = f"{int(self._now()) + SESSION_S}.{secrets.token_urlsafe(16)}"
        return f"{value}.{self._sign('session', value)}"

    def session(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if the cookie is missing, forged, expired or logged out."""
        value, _, signature = (cookie or "").rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", value).encode()):
            return None
        expires, _, nonce = value.partition(".")
        if int(expires) <= self._now() or nonce in self._logged_out:
            return None
        return Session(nonce, int(expires), self._sign("csrf", value))

    def log_out(self, session: Session) -> None:
        """End a session: its cookie is invalid from now on."""
        with self._lock:
            self._logged_out = {nonce: expires for nonce, expires in self._logged_out.items() if expires > self._now()}
            self._logged_out[session.nonce] = session.expires

    def _sign(self, purpose: str, value: str) -> str:
        return hmac.digest(self._key, f"{purpose}:{value}".encode(), "sha256").hex()

    # --- requests

    def is_known_host(self, host: str) -> bool:
        """Whether a Host header names this server. Another name may resolve to this machine: DNS rebinding."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an IP address needs no DNS, so it cannot be rebound


def token_or_new(token: str | None) -> str:
    """The token without surrounding spaces; a new one if it is None or empty. Raises BadInput if it is too short."""
    if not token:
        return secrets.token_urlsafe(24)
    if len(token.strip()) < MIN_TOKEN_LENGTH:
        raise BadInput(
            f"LIMBECK_UI_TOKEN has {len(token.strip())} characters; it needs at least {MIN_TOKEN_LENGTH}",
            fix="make one with `openssl rand -base64 24`, or unset it to get a new one at each start",
        )
    return token.strip()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def safe_local_path(path: str | None) -> str:
    """The path to go to after login; "/" for anything outside these pages."""
    if not path or not path.startswith("/") or path[1:2] in ("/", "\\") or any(ord(char) < 32 for char in path):
        return "/"
    return path


class GuardMiddleware:
    """ASGI middleware: refuses requests that `Guard` does not allow, and adds HEADERS to each answer.

    Sets `request.state.session`: None if the visitor is not logged in.
    """

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app = app
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        session = self.guard.session(request.cookies.get(self.guard.cookie))
        request.state.session = session
        answer = self._refusal(request, session) or self.app
        await answer(scope, receive, _with_headers(send))

    def _refusal(self, request: Request, session: Session | None) -> ASGIApp | None:
        """The answer to a request that is not allowed; None if it is."""
        headers = request.headers
        if not self.guard.is_known_host(headers.get("host", "")):
            message = "These pages do not have this host name. Add it: limbeck ui --allow-host NAME\n"
            return PlainTextResponse(message, 421)
        reason = _foreign_reason(request.method, headers)
        if reason:
            return PlainTextResponse(f"Refused: {reason}.\n", 403)
        if self.guard.private and session is None and not request.url.path.startswith(OPEN_PATHS):
            if request.method == "GET":
                return RedirectResponse(login_path(request), 303)
            return PlainTextResponse("Refused: log in first.\n", 401)
        return None


def login_path(request: Request) -> str:
    """The path of the login form, which leads back to the page of `request`."""
    page = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return f"/login?next={quote(page, safe='')}"


def _foreign_reason(method: str, headers: Headers) -> str | None:
    """Why a request does not come from these pages; None if it does, or if it follows a link to one of them."""
    site = headers.get("sec-fetch-site", "same-origin")
    if method in SAFE_METHODS:
        linked = site in ("same-origin", "none") or headers.get("sec-fetch-mode") == "navigate"
        return None if linked else "the request comes from another site"
    origin = headers.get("origin")
    if origin is None:
        return "the request has no Origin header; a change must come from a form of these pages"
    if site != "same-origin" or urlsplit(origin).netloc.lower() != headers["host"].lower():
        return "the form comes from another site"
    return None


def _with_headers(send: Send) -> Send:
    """Wrap `send`: add HEADERS to the answer."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-cache" if "etag" in headers else "no-store")
        await send(message)

    return send_with_headers


async def read_form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form. Raises BadInput for anything else, or for more than MAX_FORM bytes."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise BadInput("only a form of these pages is accepted here")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM:
            raise BadInput(f"the form has more than {MAX_FORM:,} bytes", fix="write a shorter reason")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise BadInput("the form is not valid urlencoded ASCII with at most 100 fields") from None
    return dict(pairs)


async def require_session_form(request: Request) -> dict[str, str]:
    """FastAPI dependency of every route that changes something: the form's fields.

    Raises NotLoggedIn without a session, or if the form's CSRF value is not that of the session.
    """
    form = await read_form(request)
    session: Session | None = request.state.session
    if session is None:
        raise NotLoggedIn("nothing was changed: you are not logged in, or your session has expired")
    if not hmac.compare_digest(form.get("csrf", "").encode(), session.csrf.encode()):
        raise NotLoggedIn("nothing was changed: the form belongs to another session", fix="reload the page")
    return form


class OncePerForm:
    """Runs the action of a form only once: if the form is sent again, it gets the first answer. Thread-safe."""

    def __init__(self) -> None:
        self._answers: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def run(self, form: str, action: Callable[[], str]) -> str:
        """The answer of `action`, which is called only for the first of equal forms; the others wait for it.

        An action that raises may be tried again with the same form.
        """
        with self._lock:
            answer = self._answers.get(form)
            is_first = answer is None
            if answer is None:
                answer = self._answers[form] = Future()
                if len(self._answers) > 1000:
                    self._answers.pop(next(iter(self._answers)))
        if is_first:
            try:
                answer.set_result(action())
            except BaseException as error:  # nothing was done: allow another try
                with self._lock:
                    self._answers.pop(form, None)
                answer.set_exception(error)
        result: str = answer.result()
        return result
