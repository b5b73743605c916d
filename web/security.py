"""Who may look and who may change: the token, sessions, and what a page of another site may not do.

Reading is open on loopback. Changing needs a session, got for the token by the login form, a form made for that
session, and a request that comes from these very pages. The token is never part of an address.
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
MAX_TRIES, TRY_WINDOW_S = 5, 60.0  # wrong tokens from one address within so many seconds
MIN_TOKEN_LENGTH = 16  # characters
MAX_FORM = 2**16  # bytes
OPEN_PATHS = ("/login", "/static/")  # are read without a session, also where reading asks for one
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    # Not "no-referrer": under it browsers send `Origin: null` with the forms of these very pages.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class NotLoggedIn(Refused):
    """The session is missing, over, or another one than the form was made for."""


@dataclass(frozen=True)
class Session:
    """Somebody who has shown the token."""

    nonce: str
    expires: int  # seconds since the epoch
    csrf: str  # what the forms made for this session carry


class Guard:
    """The token and the sessions of one running `limbeck ui`; they end with it.

    Args:
        token: what is asked for at login; None: nobody can log in, so nothing can be changed.
        hosts: names under which the pages are reached, besides addresses, localhost and this machine's name.
        private: reading needs a session too.
        now: seconds since the epoch.
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
        # Cookies are shared by all the ports of a host: two servers need two names.
        self.cookie = f"limbeck-{secrets.token_hex(4)}"
        self._logged_out: dict[str, int] = {}  # nonces of sessions that were logged out -> when they expire
        self._wrong_tokens: dict[str, deque[float]] = {}  # address -> times of wrong tokens
        self._lock = threading.Lock()

    # --- sessions

    def log_in(self, token: str, address: str) -> str:
        """The cookie of a new session.

        Args:
            token: as it was typed.
            address: of the client; too many wrong tokens from it and it has to wait.

        Raises:
            Refused: a wrong token, or too many of them.
        """
        with self._lock:
            wrong = self._wrong_tokens.setdefault(address, deque(maxlen=MAX_TRIES))
            if len(wrong) == MAX_TRIES and (wait := wrong[0] + TRY_WINDOW_S - self._now()) > 0:
                raise Refused(
                    f"{MAX_TRIES} wrong tokens within a minute", fix=f"wait {wait:.0f} seconds, then try again"
                )
            if self.token is None or not hmac.compare_digest(token.strip().encode(), self.token.encode()):
                wrong.append(self._now())
                if len(self._wrong_tokens) > 1000:
                    self._wrong_tokens.pop(next(iter(self._wrong_tokens)))
                raise Refused("that is not the token")
            self._wrong_tokens.pop(address)
        value = f"{int(self._now()) + SESSION_S}.{secrets.token_urlsafe(16)}"
        return f"{value}.{self._sign('session', value)}"

    def session(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None where it is forged, expired or logged out."""
        value, _, signature = (cookie or "").rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", value).encode()):
            return None
        expires, _, nonce = value.partition(".")
        if int(expires) <= self._now() or nonce in self._logged_out:
            return None
        return Session(nonce, int(expires), self._sign("csrf", value))

    def log_out(self, session: Session) -> None:
        """End a session: its cookie is worth nothing from now on."""
        with self._lock:
            self._logged_out = {nonce: expires for nonce, expires in self._logged_out.items() if expires > self._now()}
            self._logged_out[session.nonce] = session.expires

    def _sign(self, purpose: str, value: str) -> str:
        return hmac.digest(self._key, f"{purpose}:{value}".encode(), "sha256").hex()

    # --- requests

    def is_known_host(self, host: str) -> bool:
        """Whether a Host header names this server: another site's name that leads here is none of its."""
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
        return True  # an address needs no lookup, so nobody can have turned it


def token_or_new(token: str | None) -> str:
    """The token that is asked for: `token`, or a new one. Raises BadInput for one that is short."""
    if not token:
        return secrets.token_urlsafe(24)
    if len(token.strip()) < MIN_TOKEN_LENGTH:
        raise BadInput(
            f"LIMBECK_UI_TOKEN has {len(token.strip())} characters, at least {MIN_TOKEN_LENGTH} are asked",
            fix="make one: openssl rand -base64 24; or unset it, and one is made at each start",
        )
    return token.strip()


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def safe_local_path(path: str | None) -> str:
    """A path of these pages to go to after login; "/" for anything that leads elsewhere."""
    if not path or not path.startswith("/") or path[1:2] in ("/", "\\") or any(ord(char) < 32 for char in path):
        return "/"
    return path


class GuardMiddleware:
    """ASGI middleware: who a request comes from is settled before a page sees it; answers get HEADERS.

    Sets `request.state.session`, None for a reader.
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
        headers = request.headers
        if not self.guard.is_known_host(headers.get("host", "")):
            words = "These pages are not served under this name. Add it: limbeck ui --allow-host NAME\n"
            return PlainTextResponse(words, 421)
        if refused := _foreign_reason(request.method, headers):
            return PlainTextResponse(f"Refused: {refused}.\n", 403)
        if self.guard.private and session is None and not request.url.path.startswith(OPEN_PATHS):
            if request.method == "GET":
                return RedirectResponse(login_path(request), 303)
            return PlainTextResponse("Refused: log in first.\n", 401)
        return None


def login_path(request: Request) -> str:
    """The login form, which leads back to the page of `request`."""
    page = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return f"/login?next={quote(page, safe='')}"


def _foreign_reason(method: str, headers: Headers) -> str | None:
    """Why a request is not one of these pages' own; None where it is, or where it is a link to one."""
    site = headers.get("sec-fetch-site", "same-origin")
    if method in SAFE_METHODS:
        linked = site in ("same-origin", "none") or headers.get("sec-fetch-mode") == "navigate"
        return None if linked else "a page of another site asked for it"
    origin = headers.get("origin")
    if origin is None:
        return "a change has to come from a form of these pages, and this one does not say where it comes from"
    if site != "same-origin" or urlsplit(origin).netloc.lower() != headers["host"].lower():
        return "a page of another site sent it"
    return None


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-cache" if "etag" in headers else "no-store")
        await send(message)

    return sending


async def read_form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form. Raises BadInput for anything else, or for more than MAX_FORM bytes."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise BadInput("only a form of these pages can be sent here")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM:
            raise BadInput(f"the form has more than {MAX_FORM:,} bytes", fix="write a shorter reason")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise BadInput("the form cannot be read") from None
    return dict(pairs)


async def require_session_form(request: Request) -> dict[str, str]:
    """A dependency of whatever changes something: the fields of a form that was made for this session.

    Raises NotLoggedIn.
    """
    form = await read_form(request)
    session: Session | None = request.state.session
    if session is None:
        raise NotLoggedIn("nothing is changed: you are not logged in, or your session is over")
    if not hmac.compare_digest(form.get("csrf", "").encode(), session.csrf.encode()):
        raise NotLoggedIn("nothing is changed: this form was not made for your session", fix="load the page again")
    return form


class OncePerForm:
    """A form does what it does once, however often it is sent: later ones get the answer of the first."""

    def __init__(self) -> None:
        self._answers: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def run(self, form: str, action: Callable[[], str]) -> str:
        """The answer of `action`, which is called for the first of the same `form`; the others wait for it."""
        with self._lock:
            answer = self._answers.get(form)
            first = answer is None
            if answer is None:
                answer = self._answers[form] = Future()
                if len(self._answers) > 1000:
                    self._answers.pop(next(iter(self._answers)))
        if first:
            try:
                answer.set_result(action())
            except BaseException as error:  # nothing was done: it may be tried again
                with self._lock:
                    self._answers.pop(form, None)
                answer.set_exception(error)
        result: str = answer.result()
        return result
