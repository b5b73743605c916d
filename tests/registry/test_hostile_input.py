"""Hostile names, files, texts and database rows: each is refused with a clear message, or shown escaped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.digest import file_digest, folder_digest, read_manifest, verify_files, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError
from limbeck.registry.core.terminal import LONGEST, print_table
from limbeck.registry.gate import approvals
from limbeck.registry.gate.promotion import promote
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance.attestation import SBOM_TAG_PREFIX
from limbeck.registry.records import NewVersion
from tests.conftest import Result, new_workspace
from tests.registry.conftest import POLICY, Still, make_artifact, make_still

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202egnp\u200f\x9b31m\r"
HOSTILE = f"[bold]%s{{0}}{ESCAPES}<script>alert(1)</script>:smile:"
NFC, NFD = (unicodedata.normalize(form, "modèle") for form in ("NFC", "NFD"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Still]:
    """The model `still`, shared by all tests here: `production` points at version 3, requested and approved."""
    folder = tmp_path_factory.mktemp("hostile")
    with new_workspace(folder / "home", empty_database) as patch:
        patch.setenv("LIMBECK_USER", "ada")
        (documents := folder / "documents.parquet").write_bytes(b"documents")
        still = make_still(Store(), partial(make_artifact, folder / "made"), documents)
        still.score(still.variants["fp32"])
        approvals.request_approval(still.store, "still/3", "production", who="bob", reason="new")
        approvals.answer_request(still.store, "still/3", "production", "approve", who="eve", reason="fine")
        promote(still.store, "still/3", "production", POLICY, reason="first")
        yield still


@pytest.fixture
def still(registry: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Still]:
    """As `registry`, with its database restored after the test; `production` passed ./policy.toml."""
    monkeypatch.chdir(tmp_path)
    Path("policy.toml").write_text("[quality]\nmin_retention = 0.8\n[cost]\nmax_cost_ratio = 0.5\n")
    file = Path(os.environ["LIMBECK_HOME"]) / "mlflow.db"
    with closing(sqlite3.connect(":memory:")) as backup:
        with closing(sqlite3.connect(file)) as database:
            database.backup(backup)
        yield registry
        with closing(sqlite3.connect(file)) as database:
            backup.backup(database)


def tamper(sql: str, *values: object) -> None:
    """Change rows of the database without MLflow."""
    file = Path(os.environ["LIMBECK_HOME"]) / "mlflow.db"
    with closing(sqlite3.connect(file)) as database, database:
        assert database.execute(sql, values).rowcount > 0


def retag(key: str, value: str, version: int = 3) -> None:
    """Change a tag of a version of `still`; `key` may hold SQL's wildcards."""
    tamper("UPDATE model_version_tags SET value = ? WHERE key LIKE ? AND version = ?", value, f"limbeck.{key}", version)


def read_tag(still: Still, key: str, version: int = 3) -> str:
    tags = still.store.client.get_model_version("still", str(version)).tags
    return next(value for name, value in tags.items() if name.startswith(f"limbeck.{key}"))


def is_clean(text: str) -> bool:
    """Whether a text holds no control characters for a terminal."""
    return all(c.isprintable() or c == "\n" for c in text)


# --- names


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "a/../b",
        "a\\b",
        "a\nb",
        "a\x00b",
        '"a"',
        "a'b",
        "a`b",
        "%s",
        "a\u200fb",
        "\u202ea",
        NFD,
        "é" * 201,
        "🙂",
    ],
)
def test_invalid_names(still: Still, name: str, limbeck: Callable[..., Result]) -> None:
    with pytest.raises(BadInput, match="is not a name for a model"):
        still.store.register(
            NewVersion(name=name, kind="student"), still.store.artifacts.verified_folder(still.student)
        )
    for command in (("models", "show", f"{name}/1"), ("promote", name), ("models", "history", name)):
        code, out, err = limbeck(*command)
        assert (code, out) == (2, "")
        assert is_clean(err)


def test_long_names_and_names_that_look_equal(still: Still) -> None:
    store, folder = still.store, still.store.artifacts.verified_folder(still.student)
    long = store.register(
        NewVersion(name="ж" * 200, kind="student"), folder
    )  # its lock's name has to fit into a folder
    assert store.get(f"{long.name}/1") == long
    store.register(NewVersion(name=NFC, kind="student"), folder)
    store.register(NewVersion(name="Still", kind="student"), folder)
    assert {"Still", "still", NFC} <= set(store.model_names())
    assert len(store.versions("Still")) == 1  # another model
    with pytest.raises(BadInput, match="no model is registered"):
        store.get(f"{NFD}/1")


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v3", "V12"])
def test_aliases_that_mlflow_reserves(still: Still, alias: str, limbeck: Callable[..., Result]) -> None:
    for command in (
        ("promote", "still/3", "--alias", alias),
        ("rollback", "still", "--alias", alias),
        ("protect", "still", "--alias", alias, "--policy", "policy.toml"),
        ("request", "still/3", "--alias", alias, "--reason", "why"),
    ):
        code, _, err = limbeck(*command)
        assert (code, "is reserved by MLflow" in err) == (2, True), command
    assert still.store.aliases("still") == {"production": 3}


@pytest.mark.parametrize("alias", ["", "a/b", "../a", "a@b", "é", "a\n", "1", "x" * 101, "\x1b[2J"])
def test_invalid_aliases(still: Still, alias: str, limbeck: Callable[..., Result]) -> None:
    for command in (
        ("promote", "still/3", "--alias", alias),
        ("request", "still/3", "--alias", alias, "--reason", "why"),
    ):
        code, _, err = limbeck(*command)
        assert (code, "is not an alias" in err, is_clean(err)) == (2, True, True)


# --- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact for a test to damage."""
    return make_artifact(tmp_path / "artifact", "model")


def link(target: str) -> Callable[[Path], None]:
    """Adds a symbolic link `odd` to a folder."""
    return lambda folder: (folder / "odd").symlink_to(target)


def bind_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "odd"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (link("/etc/passwd"), "odd is a link out of the folder"),
        (link("../../secret"), "odd is a link out of the folder"),
        (link("config.json/../../../secret"), "odd is a link out of the folder"),
        (link("/etc"), "odd is a link out of the folder"),
        (link("."), "odd is a link to something that is not a file"),
        (link("gone"), "odd is a link to something that is not a file"),
        (link("odd"), "odd is a link to something that is not a file"),
        (lambda folder: os.mkfifo(folder / "odd"), "odd is neither a file nor a folder"),
        (lambda folder: os.mkfifo(folder / "limbeck.json"), "limbeck.json is neither a file nor a folder"),
        (bind_socket, "odd is neither a file nor a folder"),
        (lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff\xfe")).touch(), "is not UTF-8"),
    ],
)
def test_only_files_and_inner_links_are_allowed(
    still: Still, folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(folder)
    damage(folder)
    for read in (folder_digest, verify_files, partial(still.store.register, NewVersion(name="odd", kind="student"))):
        with pytest.raises(DamagedArtifact, match=message):
            read(folder)
    assert still.store.versions("odd") == []


def test_a_pipe_instead_of_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BadInput, match=r"no config\.json"):
        resolve_model(str(folder))


def test_inner_links_are_copied_as_files(still: Still, folder: Path) -> None:
    (folder / "alias.json").symlink_to("config.json")
    os.link(folder / "config.json", folder / "hard.json")
    made = still.store.artifacts.verified_folder(
        still.store.register(NewVersion(name="linked", kind="student"), folder)
    )
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in made.iterdir())
    assert (made / "alias.json").read_text() == (made / "hard.json").read_text() == (folder / "config.json").read_text()


def test_a_link_in_the_store_is_not_followed(still: Still) -> None:
    file = still.store.artifacts.verified_folder(still.student) / "config.json"
    aside = file.rename(file.parents[1] / "config.json")  # the same content in another place
    try:
        file.symlink_to(aside)
        with pytest.raises(DamagedArtifact, match=r"config\.json is a link out of the folder"):
            still.store.artifacts.verified_folder(still.student)
    finally:
        aside.replace(file)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../x": "0" * 64}, r"\.\./x is missing"),
        ({"/etc/passwd": "0" * 64}, "/etc/passwd is missing"),
        (["config.json"], "are not names with digests"),
        ({"config.json": 7}, "are not names with digests"),
        ("config.json", "are not names with digests"),
    ],
)
def test_manifests_that_do_not_match_the_files(folder: Path, files: object, message: str) -> None:
    (folder.parent / "x").write_text("x")
    (folder / "limbeck.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(DamagedArtifact, match=message):
        verify_files(folder)


def test_json_that_is_nested_too_deep(folder: Path) -> None:
    deep = "[" * 100_000
    (folder / "limbeck.json").write_text(deep)
    with pytest.raises(DamagedArtifact, match=r"limbeck\.json is not JSON"):
        read_manifest(folder)
    (folder / "limbeck.json").unlink()
    (folder / "config.json").write_text(deep)
    with pytest.raises(DamagedArtifact, match=r"config\.json is not JSON"):
        resolve_model(str(folder))


@pytest.mark.parametrize("size", [0, 10, 2**40, 2**63])
def test_safetensors_with_a_wrong_header_size(folder: Path, size: int) -> None:
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    resolve_model(str(folder))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors: "):
        resolve_model(str(folder))


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_invalid_index(folder: Path, index: str) -> None:
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors\.index\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "description", ["[]", "{}", '{"url": "file:///etc/passwd", "name": "x"}', '{"url": "http://x"}']
)
def test_an_invalid_endpoint(still: Still, folder: Path, description: str) -> None:
    (folder / "endpoint.json").write_text(description)
    made = still.store.register(NewVersion(name="endpoint", kind="teacher", engine="endpoint"), folder)
    with pytest.raises(DamagedArtifact, match=r"endpoint\.json"):
        resolve_model(made.ref, still.store)


@contextmanager
def serve_listing(path: str) -> Iterator[str]:
    """The address of an artifact server that lists one file with the given path."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            lists = "?path=" in self.path
            body = json.dumps({"files": [{"path": path, "is_dir": False, "file_size": 4}]}) if lists else "evil"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/m"
        server.shutdown()


@pytest.mark.parametrize(
    "path", ["../evil", "a/../../evil", "/tmp/evil", "..%2Fevil", "%252e%252e/evil", "file:///evil"]
)
def test_a_server_cannot_write_outside_the_folder(still: Still, tmp_path: Path, path: str) -> None:
    target = tmp_path / "a" / "target"
    with serve_listing(path) as address, pytest.raises(LimbeckError):
        still.store.client.download(address, target)
    assert [each for each in tmp_path.rglob("*") if "evil" in each.name and not each.is_relative_to(target)] == []
    with serve_listing("good") as address:
        assert (still.store.client.download(address, target) / "good").read_text() == "evil"


@pytest.mark.parametrize("source", ["/", "/etc", "file:///etc", "..", "/x/models/m-1/artifacts/..", "", "\x1b[2J"])
def test_a_source_outside_the_store_is_not_read(still: Still, source: str, limbeck: Callable[..., Result]) -> None:
    """It is not even listed: below / some files never end."""
    tamper("UPDATE model_versions SET source = ? WHERE version = 3", source)
    version = still.store.get("still/3")
    with pytest.raises(DamagedArtifact, match="which is not a folder that Limbeck writes"):
        still.store.artifacts.verified_folder(version)
    assert still.store.artifacts.find_local_folder(version) is None
    code, _, err = limbeck("promote", "still/3", "--alias", "staging")
    assert (code, is_clean(err)) == (2, True)
    assert still.store.aliases("still") == {"production": 3}


@pytest.mark.parametrize("digest", ["../../made", "/etc", "", "x" * 64, "0" * 63])
def test_an_invalid_digest(still: Still, digest: str, limbeck: Callable[..., Result]) -> None:
    """The cache names folders after digests and deletes a damaged one, so a digest must not be a path."""
    retag("digest", digest)
    code, _, err = limbeck("models", "show", "still/3")
    assert (code, "still/3 is unreadable: its digest is" in err) == (2, True)
    assert [version.version for version in still.store.versions("still")] == [1, 2, 4, 5]


# --- texts


def test_no_text_controls_the_terminal(still: Still, limbeck: Callable[..., Result]) -> None:
    for field in ("recipe", "licence", "author", "parent", "teacher", "family", "precision", "code_version"):
        still.store.client.set_model_version_tag("still", "4", f"limbeck.{field}", HOSTILE)
    still.score(still.store.get("still/4"), harness=HOSTILE, tasks=(HOSTILE, "choice"))
    promote(still.store, "still/3", "staging", POLICY, who=HOSTILE, reason=HOSTILE)
    output = ""
    for command in (
        ("models", "list"),
        ("models", "list", "--metric", f"{HOSTILE} > 1"),
        ("models", "show", "still/4"),
        ("models", "history", "still"),
        ("models", "lineage", "still/3"),
        ("models", "card", "still/4"),
        ("promote", "still/4", "--alias", "other"),
        ("leaderboard", "still"),
    ):
        _, out, err = limbeck(*command)
        assert is_clean(out), command
        assert is_clean(err), command
        output += out
    assert r"[bold]%s{0}\x1b[2J\x1b]0;owned\x07\u202egnp\u200f\x9b31m\r<script>" in output
    assert json.loads(limbeck("models", "show", "still/4", "--format", "json")[1])["recipe"] == HOSTILE


def test_titles_columns_and_errors_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    for count in (1, 200):
        print_table(HOSTILE, [HOSTILE], [(HOSTILE,)] * count)
        out = capsys.readouterr().out
        assert is_clean(out)
        assert out.count("[bold]") == count + 2
    error = BadInput(HOSTILE, fix=HOSTILE)
    assert is_clean(str(error))
    assert "[bold]%s{0}" in error.message


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_gets_no_formula(still: Still, text: str, limbeck: Callable[..., Result]) -> None:
    import csv
    import io

    still.store.client.set_model_version_tag("still", "3", "limbeck.recipe", text)
    rows = list(csv.DictReader(io.StringIO(limbeck("leaderboard", "still", "--format", "csv")[1], newline="")))
    assert f"'{text}".replace("\r", " ") in [row["recipe"] for row in rows]
    assert not [cell for row in rows for cell in row.values() if cell.startswith(text[0]) and not is_number(cell)]


def is_number(cell: str) -> bool:
    try:
        return bool(float(cell) or True)
    except ValueError:
        return False


def test_large_texts_are_cut_and_large_files_refused(still: Still, limbeck: Callable[..., Result]) -> None:
    retag("recipe", "x" * 5_000_000)
    for command in (("models", "list"), ("models", "show", "still/3"), ("models", "card", "still/3")):
        code, out, _ = limbeck(*command)
        assert (code, "(cut, 5,000,000 characters)" in out.replace("\n", " ")) == (0, True)
        assert len(out) < 20 * LONGEST
    pointer = json.loads(read_tag(still, "scorecard"))
    uri = still.store.client.get_run(pointer["run_id"]).info.artifact_uri
    file = Path(uri) / "scorecard.json"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b" " * 20_000_000)
        retag("scorecard.%", json.dumps(pointer | {"file": file_digest(file)}))
        code, _, err = limbeck("models", "show", "still/3")
        assert (code, "at most 20,000,000" in err) == (2, True)
    finally:
        file.write_bytes(content)
        shutil.rmtree(Path(os.environ["LIMBECK_HOME"]) / "scorecards")


# --- policies


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rule"),
        ("[quality]\nmin_retention = nan", "policy.toml:2: quality.min_retention"),
        ("[quality]\nmin_retention = 2", "policy.toml:2: quality.min_retention"),
        ("[cost]\nmax_cost_ratio = 0", "policy.toml:2: cost.max_cost_ratio"),
        ("[cost]\nmax_p95_ms = inf", "policy.toml:2: cost.max_p95_ms"),
        ("[parity]\nmax_mean_kl = nan", "policy.toml:2: parity.max_mean_kl"),
        ("[licence]\ndata = []", "so no model can pass"),
        ('[approvals]\nneeded = 2\npeople = ["ann"]', "so no model can pass"),
        ("a = " + "[" * 90_000, "nested too deep"),
        ("a." * 500 + "a = 1", "policy.toml:1: unknown key a"),
        ("# " + "x" * 100_000, "has more than 100,000 bytes"),
        ("a = [\n" + "1,\n" * 1000 + "]\nb = 1", "unknown key a"),
        ("a = '\x1b[2J'\n[quality]\nmin_retention = '\x1b[2J'", "policy.toml:1: "),
        ("a = 1\x00", "policy.toml:1: "),
    ],
)
def test_invalid_policies(still: Still, text: str, message: str, limbeck: Callable[..., Result]) -> None:
    Path("policy.toml").write_text(text)
    for command in (
        ("promote", "still/3", "--alias", "staging"),
        ("protect", "still", "--alias", "staging", "--policy", "policy.toml"),
        ("policy", "check", "policy.toml"),
    ):
        code, out, err = limbeck(*command)
        assert (code, out, is_clean(err)) == (2, "", True)
        assert message in err
    assert still.store.aliases("still") == {"production": 3}


# --- rows of the database


def change_fields(key: str, **fields: object) -> Callable[[Still], None]:
    """Changes fields in the JSON of a tag of version 3."""
    return lambda still: retag(f"{key}%", json.dumps(json.loads(read_tag(still, key)) | fields))


def run_sql(sql: str, *values: object) -> Callable[[Still], None]:
    """Changes rows of the database."""
    return lambda _: tamper(sql, *values)


SHOW, VERIFY, PROMOTE = (
    ("models", "show", "still/3"),
    ("models", "history", "still", "--verify"),
    ("promote", "still/3"),
)
ENTRIES, ANCHOR = "key LIKE 'limbeck.ledger.%'", "key = '000001'"


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (
            change_fields("scorecard.", digest="../../../etc"),
            {SHOW: "is not as Limbeck wrote it", PROMOTE: "is not as"},
        ),
        (change_fields("scorecard.", digest="0" * 64), {SHOW: "is not as Limbeck wrote it", PROMOTE: "is not as"}),
        (change_fields("scorecard.", run_id="../x"), {SHOW: "is not as Limbeck wrote it", PROMOTE: "is not as"}),
        (
            change_fields("scorecard.", file="0" * 64),
            {SHOW: "is not what was recorded", PROMOTE: "not what was recorded"},
        ),
        (lambda _: retag("scorecard.%", "[" * 100_000), {SHOW: "is not as Limbeck wrote it"}),
        (lambda _: retag("scorecard.%", "null"), {SHOW: "is not as Limbeck wrote it"}),
        (change_fields("verdict.", outcome="fail"), {SHOW: "is not as", PROMOTE: "is not as", VERIFY: "was changed"}),
        (lambda _: retag("verdict.%", "{}"), {SHOW: "is not as", PROMOTE: "is not as", VERIFY: "was changed"}),
        (
            run_sql("DELETE FROM model_version_tags WHERE key LIKE 'limbeck.verdict.%' AND version = 3"),
            {VERIFY: "the verdict"},
        ),
        (lambda _: retag("parity", '{"passed": true}'), {SHOW: "is not as Limbeck wrote it", PROMOTE: "is not as"}),
        (
            lambda _: retag(f"{SBOM_TAG_PREFIX.removeprefix('limbeck.')}%", "{}"),
            {SHOW: "is damaged", VERIFY: "was changed"},
        ),
        (
            lambda still: retag("digest", still.student.digest),
            {PROMOTE: "is of other files", VERIFY: "the digest of version 3"},
        ),
        (lambda _: retag("kind", "emperor"), {SHOW: "is unreadable: kind", PROMOTE: "is unreadable"}),
        (
            run_sql("INSERT INTO model_version_tags VALUES ('limbeck.params', '1e999', 'still', 3, 'default')"),
            {SHOW: "params"},
        ),
        (run_sql("UPDATE model_versions SET creation_time = ? WHERE version = 3", 10**18), {SHOW: "is unreadable"}),
        (run_sql("UPDATE registered_model_aliases SET version = 4"), {VERIFY: "moved it through", PROMOTE: "moved it"}),
        (
            run_sql("UPDATE registered_model_aliases SET version = 99"),
            {VERIFY: "moved it through", PROMOTE: "moved it"},
        ),
        (run_sql("DELETE FROM registered_model_aliases"), {VERIFY: "moved it through", PROMOTE: "moved it through"}),
        (
            run_sql(f"UPDATE registered_model_tags SET value = replace(value, 'ada', 'eve') WHERE {ENTRIES}"),
            {VERIFY: "entry 1 was changed", PROMOTE: "entry 1 was changed"},
        ),
        (run_sql(f"UPDATE registered_model_tags SET value = '{{}}' WHERE {ENTRIES}"), {VERIFY: "cannot be read"}),
        (run_sql(f"DELETE FROM registered_model_tags WHERE {ENTRIES}"), {VERIFY: "is missing", PROMOTE: "is missing"}),
        (run_sql("DELETE FROM registered_model_tags"), {VERIFY: "is missing", PROMOTE: "is missing"}),
        # The next promotion applies the last entry again, which moves nothing.
        (
            run_sql("UPDATE registered_model_tags SET value = ? WHERE key LIKE 'limbeck.applied.%'", "\x1b[2J"),
            {VERIFY: "is missing"},
        ),
        (
            run_sql(f"UPDATE params SET value = ? WHERE {ANCHOR}", "0" * 64),
            {VERIFY: "is missing", PROMOTE: "is missing"},
        ),
    ],
)
def test_a_changed_row_is_reported(
    still: Still,
    damage: Callable[[Still], None],
    messages: dict[tuple[str, ...], str],
    limbeck: Callable[..., Result],
) -> None:
    cache = Path(os.environ["LIMBECK_HOME"]) / "scorecards"
    shutil.rmtree(cache, ignore_errors=True)  # as on another machine
    damage(still)
    before = still.store.aliases("still")
    for command in (SHOW, VERIFY, PROMOTE):
        code, _, err = limbeck(*command)
        assert is_clean(err)
        if command in messages:
            assert (code != 0, messages[command] in err) == (True, True), f"{command}: {err}"
    assert still.store.aliases("still") == before


def test_unchanged_rows_are_accepted(still: Still, limbeck: Callable[..., Result]) -> None:
    for command in (SHOW, VERIFY, PROMOTE):
        assert limbeck(*command).code == 0


def test_the_scorecard_of_another_version_does_not_count(still: Still, limbeck: Callable[..., Result]) -> None:
    """The pointer to the scorecard of version 3, written to version 5: it is of other files."""
    store = still.store
    tags = store.client.get_model_version("still", "3").tags
    key = next(key for key in tags if key.startswith("limbeck.scorecard."))
    store.client.set_model_version_tag("still", "5", key, tags[key])
    code, _, err = limbeck("promote", "still/5", "--alias", "staging")
    assert (code, "the scorecard is of other files" in err) == (1, True)
    assert store.aliases("still") == {"production": 3}


def test_files_changed_after_their_manifest_are_not_registered(still: Still, folder: Path) -> None:
    write_manifest(folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        still.store.register(NewVersion(name="swapped", kind="student"), folder)
