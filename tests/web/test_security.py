"""Access control of the pages: sessions, forms, cross-site requests, DNS rebinding, guessed tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.web.security import (
    SESSION_S,
    TRY_WINDOW_S,
    Guard,
    GuardMiddleware,
    OncePerForm,
    Session,
    is_loopback,
    safe_local_path,
    token_or_new,
)

TOKEN = "a token that only tests know"
OWN = {"Origin": "http://127.0.0.1:8600"}


class Clock:
    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time


def guarded(guard: Guard, address: str = "http://127.0.0.1:8600") -> TestClient:
    """A client of an application with one page, which returns whether the visitor is logged in and accepts POST."""
    app = FastAPI()

    @app.api_route("/page", methods=["GET", "POST"])
    def page(request: Request) -> bool:
        return request.state.session is not None

    @app.get("/login")
    def login() -> str:
        return "the form"

    app.add_middleware(GuardMiddleware, guard=guard)
    return TestClient(app, base_url=address, follow_redirects=False)


def session(guard: Guard) -> tuple[str, Session]:
    cookie = guard.log_in(TOKEN, "a")
    found = guard.session(cookie)
    assert found is not None
    return cookie, found


def test_a_session_needs_the_token_expires_and_can_be_logged_out() -> None:
    clock = Clock()
    guard = Guard(TOKEN, clock=clock)
    with pytest.raises(Refused, match="wrong token"):
        guard.log_in(TOKEN + "x", "a")
    cookie, mine = session(guard)
    _, other = session(guard)
    assert TOKEN not in cookie
    assert mine.csrf != other.csrf
    clock.time += SESSION_S - 1
    assert guard.session(cookie) == mine
    clock.time += 1
    assert guard.session(cookie) is None
    cookie, mine = session(guard)
    guard.log_out(mine)
    assert guard.session(cookie) is None


def test_a_forged_cookie_has_no_session() -> None:
    guard = Guard(TOKEN)
    cookie, _ = session(guard)
    expires, nonce, signature = cookie.split(".")
    forged = [f"{int(expires) + 1}.{nonce}.{signature}", f"{expires}.{nonce}x.{signature}", f"{expires}.{nonce}.", ""]
    # Signed by another server, or by this one for another purpose: invalid.
    forged += [Guard(TOKEN).log_in(TOKEN, "a"), f"{expires}.{nonce}.{guard._sign('csrf', f'{expires}.{nonce}')}", "é.é"]
    assert [guard.session(cookie) for cookie in forged] == [None] * len(forged)


def test_nobody_can_log_in_if_there_is_no_token() -> None:
    guard = Guard(None)
    for tried in ("", "None"):
        with pytest.raises(Refused):
            guard.log_in(tried, "a")


def test_guessing_the_token_is_slowed_down() -> None:
    clock = Clock()
    guard = Guard(TOKEN, clock=clock)
    for _ in range(5):
        with pytest.raises(Refused, match="wrong token"):
            guard.log_in("wrong", "a")
    with pytest.raises(Refused, match="wait 60 seconds"):
        guard.log_in(TOKEN, "a")  # even with the right token: else guessing would not be slow
    assert guard.session(guard.log_in(TOKEN, "another address"))
    clock.time += TRY_WINDOW_S
    assert guard.session(guard.log_in(TOKEN, "a"))


def test_only_forms_of_these_pages_can_change_something() -> None:
    client = guarded(Guard(TOKEN))
    assert client.post("/page", headers=OWN).status_code == 200
    assert client.post("/page", headers=OWN | {"Sec-Fetch-Site": "same-origin"}).status_code == 200
    for headers in (
        {},  # browsers always send the origin of a form
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:8601"},  # another server of this machine
        {"Origin": "http://127.0.0.1:8600.evil.example"},
        OWN | {"Sec-Fetch-Site": "cross-site"},
        OWN | {"Sec-Fetch-Site": "same-site"},
    ):
        assert client.post("/page", headers=headers).status_code == 403, headers


def test_other_sites_can_link_to_these_pages_but_not_embed_them() -> None:
    client = guarded(Guard(TOKEN))
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/page", headers=linked).status_code == 200
    answer = client.get("/page", headers=linked | {"Sec-Fetch-Mode": "no-cors"})
    assert answer.status_code == 403
    for response in (answer, client.get("/page")):
        headers = response.headers
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "'unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8600", 200),
        ("localhost", 200),
        ("[::1]:8600", 200),
        ("10.1.2.3", 200),  # an IP address needs no DNS
        ("registry.example:8600", 200),
        ("REGISTRY.example.", 200),
        ("evil.example:8600", 421),  # a name rebound to this machine
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_only_known_host_names_are_answered(host: str, status: int) -> None:
    client = guarded(Guard(TOKEN, hosts=["registry.example"]))
    assert client.get("/page", headers={"Host": host}).status_code == status


def test_private_pages_can_be_read_only_after_login() -> None:
    guard = Guard(TOKEN, private=True)
    client = guarded(guard)
    answer = client.get("/page?a=1&b=2")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login?next=%2Fpage%3Fa%3D1%26b%3D2")
    assert client.post("/page", headers=OWN).status_code == 401
    assert client.get("/login").status_code == 200
    client.cookies.set(guard.cookie, session(guard)[0])
    assert client.get("/page").json() is True


def test_two_servers_on_one_machine_use_different_cookies() -> None:
    assert Guard(TOKEN).cookie != Guard(TOKEN).cookie


def test_login_leads_only_to_paths_of_these_pages() -> None:
    assert safe_local_path("/models/a/1?x=1#y") == "/models/a/1?x=1#y"
    for elsewhere in ("//evil.example", "/\\evil.example", "https://evil.example", "evil", "", None, "/a\nb"):
        assert safe_local_path(elsewhere) == "/"


def test_a_token_is_generated_or_checked_for_its_length() -> None:
    assert token_or_new(None) != token_or_new(None)
    assert len(token_or_new("")) >= 32
    assert token_or_new(f" {TOKEN}\n") == TOKEN
    with pytest.raises(BadInput, match="has 5 characters; it needs at least 16"):
        token_or_new("short")


def test_loopback_addresses_are_recognized() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com")))


def test_a_form_runs_its_action_once_and_again_only_after_an_error() -> None:
    once, acts, ready = OncePerForm(), [], Barrier(8)

    def act() -> str:
        acts.append(1)
        return f"answer {len(acts)}"

    def send(_: int) -> str:
        ready.wait()
        return once.run("form", act)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(send, range(8))) == {"answer 1"}
    assert once.run("another form", act) == "answer 2"

    def fail() -> str:
        raise Refused("no")

    with pytest.raises(Refused):
        once.run("third", fail)
    assert once.run("third", act) == "answer 3"
