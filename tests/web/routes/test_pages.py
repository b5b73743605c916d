"""The pages for reading, over HTTP on a real registry: what they show, and that all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from fastapi.testclient import TestClient

from limbeck.registry.core.errors import Unreachable
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Version
from limbeck.web import leaderboards
from limbeck.web.app import create_app
from limbeck.web.site import public_address
from tests.registry.conftest import POLICY, Still, make_artifact
from tests.web.strict_page import HOSTILE, StrictPage


@pytest.fixture(scope="module")
def pages(registry: Still) -> Iterator[TestClient]:
    """The pages over the model `still`, whose student has a run with curves, and a model `evil`."""
    store = registry.store
    with store.runs.start("train", params={"recipe.width": 8}) as run:
        for step in range(5):
            run.log_metrics({"loss": 5.0 - step, "learning_rate": 0.1}, step)
        run.log_metrics({"heldout_bits_per_byte": 2.0})
    folder = Path(store.artifacts.verified_folder(registry.student)).parent / "evil"
    folder.mkdir()
    (folder / 'a"<b>.txt').write_text("x")
    fields = dict.fromkeys(("recipe", "licence", "code_version", "teacher_licence", "precision"), HOSTILE)
    evil = store.register(
        NewVersion(
            name="evil",
            kind="student",
            parent=registry.teacher.ref,
            teacher=registry.teacher.ref,
            run_id=run.id,
            **fields,
        ),
        folder,
    )
    store.client.set_model_version_tag("evil", "1", "limbeck.author", HOSTILE)
    store.client.set_model_version_tag("evil", "1", "limbeck.parent", "no<b>thing/1")
    registry.score(evil, harness=HOSTILE)
    with TestClient(create_app(store, policy=POLICY), base_url="http://127.0.0.1") as client:
        yield client


def get(pages: TestClient, path: str, status: int = 200) -> StrictPage:
    answer = pages.get(path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    return StrictPage(answer.text)


def test_the_first_page_lists_models(pages: TestClient, registry: Still) -> None:
    page = get(pages, "/")
    assert {"/models/still", "/models/still/1", "/models/still/5"} <= set(page.links())
    still = next(model for model in pages.get("/?format=json").json() if model["name"] == "still")
    assert still["versions"] == 5
    assert still["teacher"] == "still/1"
    assert still["best"]["version"] == "still/4"  # int8 is as good as fp32, and cheaper
    assert "97.0%" in page.shown_text


def test_a_leaderboard_applies_the_filters_and_order_of_its_address(pages: TestClient) -> None:
    def rows(path: str) -> list[str]:
        lines = re.findall(r'<tr class="[^"]*" data-row="\d+"( hidden)?><td data-value="([^"]*)"', pages.get(path).text)
        return [ref.rpartition("/")[2] for hidden, ref in lines if not hidden]

    assert rows("/models/still") == ["4", "3", "5", "1", "2"]
    assert rows("/models/still?sort=version&reverse=1") == ["5", "4", "3", "2", "1"]
    assert rows("/models/still?precision=int4") == ["5"]
    page = get(pages, "/models/still?cost=p50_ms&sort=usd_per_million_tokens&kind=onnx")
    assert [attrs.get("value") for tag, attrs in page.tags if tag == "option" and "selected" in attrs] == [
        "",
        "p50_ms",
        "",
        "",
        "onnx",
    ]
    heads = {str(attrs["data-key"]): attrs for tag, attrs in page.tags if tag == "th"}
    assert heads["usd_per_million_tokens"]["aria-sort"] == "ascending"
    assert "/models/still?cost=p50_ms&kind=onnx&sort=usd_per_million_tokens&reverse=1" in page.links()
    assert [row["version"] for row in pages.get("/models/still?precision=int4&format=json").json()] == ["still/5"]
    assert "there are: usd_per_million_tokens" in get(pages, "/models/still?cost=p5", 400).shown_text


def test_a_leaderboard_of_many_versions_has_pages(pages: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboards, "ROWS_PER_PAGE", 2)
    first, last = get(pages, "/models/still?recipe=small"), get(pages, "/models/still?recipe=small&page=2")
    assert "/models/still?recipe=small&page=2" in first.links()
    assert "Page 1 of 2: 4 versions" in first.shown_text
    shown = [[attrs["value"] for tag, attrs in page.tags if attrs.get("type") == "checkbox"] for page in (first, last)]
    assert shown == [["still/4", "still/3"], ["still/5", "still/2"]]
    assert '"version":"still/5"' in pages.get("/models/still?recipe=small").text  # still a point of the plot
    assert "Page 2 of 2" in get(pages, "/models/still?recipe=small&page=99").shown_text


def test_a_leaderboard_is_cached_until_an_alias_changes(pages: TestClient, registry: Still) -> None:
    site = pages.app.state.site  # type: ignore[attr-defined]
    before = site.leaderboards.rows("still")
    assert site.leaderboards.rows("still") is before
    registry.store.client.set_registered_model_alias("still", "trial", 3)
    try:
        assert next(row for row in site.leaderboards.rows("still") if row.version == "still/3").aliases == ("trial",)
    finally:
        registry.store.client.delete_registered_model_alias("still", "trial")
    assert site.leaderboards.rows("still") == before


def test_the_page_of_a_version_has_all_its_data(pages: TestClient, registry: Still) -> None:
    int8 = registry.variants["int8-weight"]
    page = get(pages, f"/models/still/{int8.version}")
    links = {"/models/still/1", "/models/still/2", "/models/still/4/card", "/models/still/4/flips?against=still%2F1"}
    assert links <= set(page.links())
    for text in (
        int8.digest,
        "97.0%",
        "95.0% to 99.0%",
        "model.onnx",
        "limbeck deploy still/4",
        "not stated",
        "25.0%",
    ):
        assert text in page.shown_text
    assert "No recorded verdict" in page.shown_text
    data = pages.get(f"/models/still/{int8.version}?format=json").json()
    assert data["digest"] == int8.digest
    assert [card["artifact"] for card in data["scorecards"]] == [int8.digest]
    assert data["files"][1]["name"] == "model.onnx"
    assert [node["version"] for node in data["lineage"]] == ["still/1"]
    assert "Not scored yet" in get(pages, "/models/still/2").shown_text


def test_curves_can_be_chosen_in_the_address(pages: TestClient) -> None:
    def drawn(path: str) -> list[str]:
        return re.findall(r"<figcaption>(.*?)</figcaption>", pages.get(path).text)

    assert drawn("/models/evil/1") == ["loss", "learning_rate"]  # one point is no curve
    assert drawn("/models/evil/1?curve=loss&curve=none") == ["loss"]
    assert "step 4: 1" in pages.get("/models/evil/1").text


def test_the_model_card_is_rendered_as_html_and_markdown(pages: TestClient) -> None:
    page = get(pages, "/models/still/4/card")
    assert ("h2", {}) in page.tags
    assert "Where it comes from" not in page.shown_text
    answer = pages.get("/models/still/4/card?format=md")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert answer.text.startswith("---\n")


def test_flips_are_shown_page_by_page(pages: TestClient) -> None:
    page = get(pages, "/models/still/4/flips?against=still/3")  # int8 has 7 wrong, fp32 5, in each of two tasks
    assert "all: 4" in page.shown_text
    assert "<i>no</i>" in page.shown_text
    one = get(pages, "/models/still/4/flips?against=still/3&task=bits")
    assert one.shown_text.count("question") == 2
    many = pages.get("/models/still/5/flips?against=still/4&format=json&page=5").json()
    assert len(many) == 6  # of 106: the last of five pages
    assert "no common documents" in get(pages, "/models/still/2/flips?against=still/3").shown_text
    assert "no model is registered" in get(pages, "/models/still/4/flips?against=nothing/1").shown_text


def test_two_versions_are_compared(pages: TestClient) -> None:
    page = get(pages, "/compare?v=still/4&v=still/3")
    assert "-0.0250" in page.shown_text  # two of 80
    assert "int8-weight" in page.shown_text
    assert "/models/still/4/flips?against=still%2F3" in page.links()
    assert pages.get("/compare?a=still/4&b=still/3&format=json").json()["a"]["precision"] == "int8-weight"
    assert "required" in pages.get("/compare?a=still/4").text
    assert "it has 1, 2, 3, 4, 5" in get(pages, "/compare?a=still/4&b=still/9", 404).shown_text


@pytest.mark.parametrize(
    ("query", "refs"),
    [
        ("", ["evil/1", "still/1", "still/2", "still/3", "still/4", "still/5"]),
        ("kind=onnx precision=int8-weight", ["still/4"]),
        ("int4", ["still/5"]),
        ("STILL onnx fp32", ["still/3"]),
        ("cost<=1 kind=onnx", ["still/4", "still/5"]),
        ("since=2100-01-01", []),
        ("tags.`limbeck.precision` = 'int4'", ["still/5"]),
    ],
)
def test_versions_are_searched(pages: TestClient, query: str, refs: list[str]) -> None:
    assert [hit["ref"] for hit in pages.get(f"/versions?q={quote(query)}&format=json").json()] == refs
    assert set(get(pages, f"/versions?q={quote(query)}").links()) >= {f"/models/{ref}" for ref in refs}


def test_versions_are_sorted_by_a_metric(pages: TestClient) -> None:
    page = get(pages, "/models/still/versions?q=kind%3Donnx&sort=-cost")
    assert [link for link in page.links() if re.fullmatch("/models/still/[345]", link)] == [
        f"/models/still/{number}" for number in (3, 4, 5)
    ]


def test_errors_name_the_problem_and_the_fix(pages: TestClient) -> None:
    assert "did you mean still?" in get(pages, "/models/stil", 404).shown_text
    assert "it has 1, 2, 3, 4, 5" in get(pages, "/models/still/6", 404).shown_text
    get(pages, "/models/still/0", 404)
    assert "there is no page at /nope" in get(pages, "/nope", 404).shown_text
    assert "'>3' is no" not in get(pages, "/versions?q=nothing%3E3", 400).shown_text
    assert pages.get("/models/stil?format=json").json()["fix"] == "did you mean still?"
    get(pages, "/models/still?page=0", 400)
    get(pages, "/models/..%2F..%2Fetc%2Fpasswd", 404)


def test_an_unreachable_tracking_server_is_reported(
    pages: TestClient, registry: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise Unreachable("the tracking server http://x does not answer: connection refused", fix="start it")

    monkeypatch.setattr(Store, "get", gone)
    assert "connection refused" in get(pages, "/models/still/4", 503).shown_text


def test_a_damaged_part_does_not_hide_the_others(
    pages: TestClient, registry: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fp32 = registry.store, registry.variants["fp32"]
    parity = store.client.get_model_version("still", "3").tags["limbeck.parity"]
    store.client.set_model_version_tag("still", "3", "limbeck.parity", "{}")
    try:
        page = get(pages, "/models/still/3")
        assert [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]
        assert "limbeck.parity" in page.shown_text
        assert fp32.digest in page.shown_text
    finally:
        store.client.set_model_version_tag("still", "3", "limbeck.parity", parity)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/models/evil",
        "/models/evil/versions",
        "/models/evil/lineage",
        "/models/evil/1",
        "/models/evil/1/card",
        "/models/evil/1/flips",
        "/compare?a=evil/1&b=still/3",
        f"/compare?a={quote(HOSTILE)}&b=x",
        f"/versions?q={quote(HOSTILE)}",
        f"/models/{quote(HOSTILE, safe='')}",
        f"/models/evil?task={quote(HOSTILE)}&recipe={quote(HOSTILE)}",
        f"/models/evil/1?curve={quote(HOSTILE)}",
    ],
)
def test_hostile_text_never_becomes_markup(pages: TestClient, path: str) -> None:
    answer = pages.get(path)
    assert answer.status_code in (200, 400, 404)
    page = StrictPage(answer.text)
    for tag, attrs in page.tags:
        assert tag != "img"
        assert not [name for name in attrs if name.startswith("on")]
        assert not any(
            str(attrs.get(name, "")).strip().lower().startswith("javascript:") for name in ("href", "action")
        )
        if tag == "script":
            assert str(attrs.get("src", "")).startswith("/static/") or attrs == {
                "type": "application/json",
                "id": "data",
            }
    assert "<script>alert" not in answer.text


def test_hostile_text_is_shown_unchanged(pages: TestClient) -> None:
    assert HOSTILE in get(pages, "/models/evil/1").shown_text
    assert 'a"<b>.txt' in get(pages, "/models/evil/1").shown_text
    assert "no<b>thing/1" in get(pages, "/models/evil/lineage").shown_text


def test_pages_are_read_from_many_threads_at_once(pages: TestClient) -> None:
    paths = ["/", "/models/still", "/models/still/4", "/models/evil/1", "/versions", "/models/still/history"] * 4
    with ThreadPoolExecutor(8) as pool:
        answers: list[httpx.Response] = list(pool.map(pages.get, paths))
    assert {answer.status_code for answer in answers} == {200}


def test_pages_load_nothing_from_other_sites(pages: TestClient) -> None:
    for path in ("/", "/models/still", "/models/still/4", "/compare?a=still/4&b=still/3"):
        page = get(pages, path)
        fetched = [attrs.get(name) for tag, attrs in page.tags for name in ("src", "srcset") if name in attrs]
        fetched += [attrs["href"] for tag, attrs in page.tags if tag == "link"]
        assert all(str(path).startswith("/static/") for path in fetched)
        assert not [tag for tag, attrs in page.tags if "style" in attrs or tag in ("style", "iframe")]
        for path in fetched:
            assert pages.get(str(path)).status_code == 200
    assert pages.get("/static/page.py").status_code == 404


def test_runs_are_linked_without_credentials(registry: Still, pages: TestClient) -> None:
    assert public_address("https://user:secret@host:5000/mlflow/?x#y") == "https://host:5000/mlflow"
    assert public_address("sqlite:////tmp/mlflow.db") is None
    assert public_address("javascript:alert(1)") is None
    app = create_app(registry.store, mlflow_ui="http://ada:secret@mlflow:5000")
    run = registry.store.get("evil/1").run_id
    text = TestClient(app, base_url="http://127.0.0.1").get("/models/evil/1").text
    assert re.search(rf'href="http://mlflow:5000/#/experiments/\d+/runs/{run}"', text)
    assert "secret" not in text


def test_the_theme_of_the_cookie_is_used(pages: TestClient) -> None:
    assert 'data-theme="dark"' in pages.get("/", headers={"cookie": "theme=dark"}).text
    assert "data-theme" not in pages.get("/", headers={"cookie": 'theme="><script>'}).text


def test_an_empty_registry_has_pages(store: Store, tmp_path: Path) -> None:
    with TestClient(create_app(store), base_url="http://127.0.0.1") as client:
        assert "limbeck quickstart" in get(client, "/").shown_text
        get(client, "/versions")
        only: Version = store.register(NewVersion(name="only", kind="teacher"), make_artifact(tmp_path, "only"))
        assert "Not scored yet" in get(client, f"/models/only/{only.version}").shown_text
        get(client, "/models/only")
        get(client, "/models/only/1/flips")
        assert "limbeck eval only/1" in get(client, "/models/only/1").shown_text
