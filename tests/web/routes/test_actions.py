"""The pages that change something, over HTTP on a real registry. Each test has its own alias."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from limbeck.registry.gate import approvals, protection
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import log
from limbeck.registry.policy.schema import ApprovalRules, OverrideRules
from limbeck.registry.records import LedgerEntry, Version
from tests.registry.conftest import POLICY, Still
from tests.web.conftest import TOKEN, Site
from tests.web.visitor import Visitor, logged_in_visitor

HOSTILE = "<script>alert(1)</script><b>\"'&javascript:"
LedgerState = tuple[dict[str, int], list[LedgerEntry]]


def ledger_state(site: Site) -> LedgerState:
    """All aliases and all ledger entries."""
    ledger = log.read_ledger(site.store, "still")
    return dict(ledger.aliases), list(ledger.entries)


def entries(site: Site, alias: str) -> list[LedgerEntry]:
    return [entry for entry in log.read_entries(site.store, "still") if entry.alias == alias]


def number(site: Site, precision: str) -> int:
    return site.still.variants[precision].version


@pytest.fixture
def unchanged(site: Site) -> Iterator[None]:
    """Fails the test if it moved an alias or wrote a ledger entry."""
    before = ledger_state(site)
    yield
    assert ledger_state(site) == before


def open_form(visitor: Visitor, site: Site, precision: str, alias: str) -> tuple[str, dict[str, str]]:
    """The path and fields of the form that promotes a variant, from its page."""
    path = f"/models/still/{number(site, precision)}/promote"
    return path, visitor.get(f"{path}?alias={alias}").form(path)


# --- reading


@pytest.mark.usefixtures("unchanged")
def test_a_visitor_without_a_session_sees_everything_with_disabled_buttons(site: Site) -> None:
    reader = Visitor(site)
    page = reader.get(f"/models/still/{number(site, 'int8-weight')}/promote")
    assert "Verdict: pass" in page.text
    assert "retention 0.9700 [0.9500, 0.9900]" in page.text
    assert page.buttons[f"Promote still/{number(site, 'int8-weight')} to production"] is False
    assert (
        "a",
        {"href": f"/login?next=/models/still/{number(site, 'int8-weight')}/promote%3Falias%3Dproduction"},
    ) in page.tags
    assert reader.get("/models/still/rollback").buttons["Roll back"] is False
    page = reader.get("/models/still/promote")
    assert page.text.index("still/5") < page.text.index("still/4") < page.text.index("still/3")  # cheapest first
    assert "quality.min_retention" in page.text
    reader.get("/models/still/history")
    reader.get("/requests")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("page", ["4/promote", "rollback", "4/request", "4/answer"])
def test_a_change_without_a_session_is_refused(site: Site, page: str) -> None:
    form = {
        "csrf": "",
        "form_id": "1",
        "alias": "production",
        "last_entry_hash": "",
        "verdict_digest": "",
        "reason": "r",
    }
    answer = Visitor(site).post(f"/models/still/{page}", form)
    assert answer.status_code == 403
    assert "you are not logged in" in answer.text
    # A GET changes nothing, whatever its parameters.
    assert logged_in_visitor(site).http.get(f"/models/still/{page}", params=form).status_code in (200, 405)


@pytest.mark.usefixtures("unchanged")
def test_a_form_is_valid_for_its_session_only(site: Site) -> None:
    path, form = open_form(logged_in_visitor(site), site, "int8-weight", "production")
    for csrf in (form["csrf"], "", "0" * 64):
        answer = logged_in_visitor(site).post(path, form | {"csrf": csrf})
        assert (answer.status_code, "belongs to another session" in answer.text) == (403, True)
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "int8-weight", "production")
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert visitor.post(path, form, headers=headers).status_code == 403
    assert visitor.post("/logout", {"csrf": form["csrf"]}).status_code == 303
    visitor.http.cookies.clear()
    assert visitor.post(path, form).status_code == 403


def test_a_cookie_is_invalid_after_logout(site: Site) -> None:
    visitor = logged_in_visitor(site)
    _, form = open_form(visitor, site, "int8-weight", "production")
    cookies = dict(visitor.http.cookies)
    visitor.post("/logout", {"csrf": form["csrf"]})
    assert not visitor.http.cookies
    visitor.http.cookies.update(cookies)  # a copy of the cookie from before
    assert "Log in" in visitor.get("/requests").text


def test_login_sets_a_safe_cookie_and_does_not_leave_these_pages(site: Site) -> None:
    visitor = Visitor(site)
    answer = visitor.post("/login", {"token": "wrong", "next": "/requests"})
    assert (answer.status_code, "wrong token" in answer.text) == (403, True)
    assert "Set-Cookie" not in answer.headers
    answer = visitor.post("/login", {"token": TOKEN, "next": "//evil.example"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    https = visitor.post("/login", {"token": TOKEN}, headers={"X-Forwarded-Proto": "https"})  # behind a TLS proxy
    assert "Secure" in https.headers["Set-Cookie"]


@pytest.mark.usefixtures("unchanged")
def test_unknown_models_and_invalid_forms_are_refused(site: Site) -> None:
    reader = Visitor(site)
    assert "did you mean still?" in reader.get("/models/stil/history", 404).text
    for path in (
        "/models/still/99/promote",
        "/models/still/4/promote?alias=v1",
        "/models/still/rollback?alias=%3Cb%3E",
    ):
        reader.get(f"/models/still/{path}", 404)
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "int8-weight", "production")
    del form["verdict_digest"]
    assert visitor.post(path, form).status_code == 400
    assert visitor.post(path, form | {"reason": "x" * 70_000}).status_code == 400
    json = visitor.http.post(path, json=form)
    assert (json.status_code, "only a form" in json.text) == (400, True)


# --- promote


def test_a_form_that_is_sent_three_times_promotes_once(site: Site) -> None:
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "int8-weight", "first")
    form["reason"] = HOSTILE
    with ThreadPoolExecutor(3) as threads:  # a double click, and one more
        answers = list(threads.map(lambda _: visitor.post(path, form), range(3)))
    (entry,) = entries(site, "first")
    assert {(a.status_code, a.headers["Location"]) for a in answers} == {
        (303, f"/models/still/history?entry={entry.sequence}")
    }
    assert (entry.action, entry.to_version, entry.who, entry.reason) == ("promote", 4, "ada", HOSTILE)
    page = visitor.get(answers[0].headers["Location"])
    assert "still@first is now still/4 (before: not set)" in page.text
    assert HOSTILE in page.text  # as text
    assert all(tag != "script" or "src" in attributes for tag, attributes in page.tags)
    page = visitor.get(f"{path}?alias=first")
    assert page.buttons["Promote still/4 to first"] is False
    assert "first is still/4 already" in page.text


@pytest.mark.usefixtures("unchanged")
def test_a_failing_version_has_a_disabled_button_and_a_forged_form_is_refused(site: Site) -> None:
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "int4", "failing")
    page = visitor.get(f"{path}?alias=failing")
    assert page.buttons["Promote still/5 to failing"] is False
    assert "the verdict is fail" in page.text
    assert "Override" not in page.text
    answer = visitor.post(path, form | {"reason": HOSTILE})
    assert answer.status_code == 409
    assert "retention 0.5000 [0.4000, 0.6000], at least 0.8000 is required" in answer.text
    assert "<b>&#34;" not in answer.text
    forged = form | {"override": "yes", "confirm": "still/5", "reason": "I want to"}
    answer = visitor.post(path, forged)
    assert (answer.status_code, "override" in answer.text) == (409, True)


def test_a_form_is_refused_if_the_verdict_or_the_alias_has_changed(site: Site) -> None:
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "fp32", "stale")
    site.still.score(site.still.variants["fp32"], usd=2.0, retention=(0.96, 0.94, 0.98))  # passes, otherwise
    answer = visitor.post(path, form)
    assert (answer.status_code, entries(site, "stale")) == (409, [])
    assert "the gate decision on still/3 differs from the one shown" in answer.text
    assert "retention 0.9600" in answer.text
    path, form = open_form(visitor, site, "fp32", "stale")
    promote(site.store, "still/4", "stale", POLICY, who="bob")
    answer = visitor.post(path, form)
    assert (answer.status_code, "still@stale was moved meanwhile" in answer.text) == (409, True)
    assert [entry.to_version for entry in entries(site, "stale")] == [4]


@pytest.mark.usefixtures("unchanged")
def test_a_version_with_changed_files_is_not_promoted(site: Site) -> None:
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "fp32", "changed")
    file = site.store.artifacts.verified_folder(site.still.variants["fp32"]) / "model.onnx"
    was = file.read_text()
    try:
        file.write_text("changed")
        answer = visitor.post(path, form)
        assert (answer.status_code, "is damaged" in answer.text) == (409, True)
    finally:
        file.write_text(was)


def test_an_override_needs_permission_a_reason_and_confirmation_and_is_visible(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = POLICY.model_copy(update={"override": OverrideRules(people=("ada",))})
    protection.protect(site.store, "still", "forced", strict, who="ada")
    visitor = logged_in_visitor(site)
    path, form = open_form(visitor, site, "int4", "forced")
    page = visitor.get(f"{path}?alias=forced")
    assert (page.buttons["Promote still/5 to forced"], page.buttons["Override and promote"]) == (False, True)
    form = next(form for form in page.forms if "override" in form) | {"reason": "the outage of tonight"}
    assert (visitor.post(path, form).status_code, entries(site, "forced")[1:]) == (400, [])  # not confirmed
    assert visitor.post(path, form | {"confirm": "still/5", "reason": " "}).status_code == 400
    monkeypatch.setenv("LIMBECK_USER", "bob")
    assert visitor.post(path, form | {"confirm": "still/5"}).status_code == 409
    assert "Override" not in visitor.get(f"{path}?alias=forced").text
    monkeypatch.setenv("LIMBECK_USER", "ada")
    answer = visitor.post(path, form | {"confirm": "still/5"})
    assert answer.status_code == 303
    entry = entries(site, "forced")[-1]
    assert (entry.override, entry.to_version, len(entry.overridden_rules)) == (True, 5, 1)
    page = visitor.get("/models/still/history")
    assert ("strong", {"class": "tag fail"}) in page.tags
    assert "quality.min_retention (fail)" in page.text


# --- roll back


def test_a_rollback_goes_back_one_step_and_needs_a_reason(site: Site) -> None:
    for precision in ("fp32", "int8-weight"):
        promote(site.store, f"still/{number(site, precision)}", "back", POLICY, who="bob", reason=f"the {precision}")
    visitor, path = logged_in_visitor(site), "/models/still/rollback"
    page = visitor.get(f"{path}?alias=back")
    assert "the fp32" in page.text
    assert "Verdict at that time: pass" in page.text
    assert page.buttons["Roll back to still/3"] is True
    form = page.form(path)
    assert visitor.post(path, form).status_code == 400  # no reason
    assert len(entries(site, "back")) == 2
    form["reason"] = "int8-weight is slower here"
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: visitor.post(path, form), range(3)))
    assert {answer.status_code for answer in answers} == {303}
    *_, entry = found = entries(site, "back")
    assert (len(found), entry.action, entry.to_version, entry.reason) == (3, "rollback", 3, form["reason"])
    # The same page from another window, which does not show the rollback.
    answer = visitor.post(path, form | {"form_id": "another"})
    assert (answer.status_code, "ada has moved" in answer.text) == (409, True)
    page = visitor.get(f"{path}?alias=back")
    assert page.buttons["Remove back"] is True
    answer = visitor.post(path, page.form(path, reason="away"))
    assert "still@back was removed" in visitor.get(answer.headers["Location"]).text
    assert visitor.get(f"{path}?alias=back").buttons["Roll back"] is False


def test_a_rollback_to_damaged_files_is_refused(site: Site) -> None:
    visitor, path = logged_in_visitor(site), "/models/still/rollback"
    for precision in ("fp32", "int8-weight"):
        promote(site.store, f"still/{number(site, precision)}", "worn", POLICY)
    before = ledger_state(site)
    form = visitor.get(f"{path}?alias=worn").form(path, reason="why not")
    file = site.store.artifacts.verified_folder(site.still.variants["fp32"]) / "model.onnx"
    was = file.read_text()
    try:
        file.write_text("changed")
        answer = visitor.post(path, form)
    finally:
        file.write_text(was)
    assert (answer.status_code, "is damaged" in answer.text, ledger_state(site)) == (409, True, before)


# --- requests


def test_request_approve_and_promote(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = POLICY.model_copy(update={"approvals": ApprovalRules(needed=1, people=("bob", "cy"))})
    protection.protect(site.store, "still", "asked", asks, who="root")
    monkeypatch.setenv("LIMBECK_USER", "dan")
    visitor, path = logged_in_visitor(site), "/models/still/4/promote"
    page = visitor.get(f"{path}?alias=asked")
    assert page.buttons["Promote still/4 to asked"] is False
    answer = visitor.post("/models/still/4/request", page.form("/models/still/4/request", reason=HOSTILE))
    assert answer.status_code == 303
    page = visitor.get(answer.headers["Location"])
    assert HOSTILE in page.text
    assert "Your answer would not count: dan made the request" in page.text
    page = visitor.get("/requests")
    assert HOSTILE in page.text
    assert "bob, cy" in page.text
    monkeypatch.setenv("LIMBECK_USER", "bob")
    page = visitor.get(f"{path}?alias=asked")
    assert page.buttons["Approve as bob"] is True
    form = page.form("/models/still/4/answer")
    forged = visitor.post("/models/still/4/answer", form | {"answer": "maybe"})
    assert forged.status_code == 400
    other = visitor.post("/models/still/4/answer", form | {"answer": "approve", "verdict_digest": "0" * 64})
    assert (other.status_code, "the verdict has changed" in other.text) == (409, True)
    assert visitor.post("/models/still/4/answer", form | {"answer": "reject"}).status_code == 400  # without a reason
    assert visitor.post("/models/still/4/answer", form | {"answer": "approve", "reason": "tried it"}).status_code == 303
    (answered,) = approvals.request_and_answers(site.store, version(site, 4), "asked")[1]
    assert (answered.who, answered.answer, answered.reason) == ("bob", "approve", "tried it")
    page = visitor.get(f"{path}?alias=asked")
    assert page.buttons["Promote still/4 to asked"] is True
    assert visitor.post(path, page.form(path)).status_code == 303
    assert entries(site, "asked")[-1].approvals == (answered.digest(),)
    assert "There are no open requests" in visitor.get("/requests").text


def version(site: Site, number: int) -> Version:
    return site.store.get(f"still/{number}")


# --- history


def test_a_moved_alias_is_reported_on_top_and_blocks_every_change(site: Site) -> None:
    promote(site.store, "still/4", "moved", POLICY)
    site.store.client.set_registered_model_alias("still", "moved", "5")  # behind the ledger's back
    try:
        visitor = logged_in_visitor(site)
        page = visitor.get("/models/still/history")
        assert "somebody moved it through MLflow itself" in page.text
        assert "agree." not in page.text.replace("do not agree.", "")
        path, form = open_form(visitor, site, "fp32", "moved")
        assert visitor.get(f"{path}?alias=moved").buttons["Promote still/3 to moved"] is False
        assert visitor.post(path, form).status_code == 409
        assert visitor.get("/models/still/rollback?alias=moved").buttons["Roll back"] is False
        history = visitor.http.get("/models/still/history?format=json").json()
        assert history["problems"]
        assert history["aliases"]["moved"] == 5
    finally:
        site.store.client.set_registered_model_alias("still", "moved", "4")
    assert "agree." in visitor.get("/models/still/history").text.replace("do not agree.", "")


def test_an_alias_without_a_policy_cannot_be_promoted(registry: Still) -> None:
    from starlette.testclient import TestClient

    from limbeck.web.app import create_app

    client = TestClient(create_app(registry.store), base_url="http://127.0.0.1")
    page = client.get("/models/still/4/promote").text
    assert "production has no policy" in page
    assert '<button class="main"' in page
    assert "this alias has no policy" in page
    assert "without a token" in client.get("/login").text
    assert client.post("/login", data={"token": ""}, headers={"Origin": "http://127.0.0.1"}).status_code == 403
