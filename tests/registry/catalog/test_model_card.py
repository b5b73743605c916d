"""Model cards: what programs and people read in them, and that text from users is escaped."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from limbeck.registry.catalog.model_card import model_card
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

HOSTILE = "x | <script>alert(1)</script>\n---\n# gotcha\n[a](javascript:b) `c`"


def test_programs_read_the_header(scored: Still, limbeck: Callable[..., Result]) -> None:
    text = limbeck("models", "card", "still/4").out
    assert text == model_card(scored.store, scored.variants["int8-weight"])
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("still/2", "quantized", "onnx")
    results = {(each.dataset_name, each.metric_type): each for each in data.eval_results}
    assert results.keys() == {(task, metric) for task in ("bits", "choice") for metric in ("acc", "retention")}
    assert results["bits", "retention"].metric_args == {"low": 0.95, "high": 0.99, "confidence": 0.95}
    assert results["bits", "acc"].metric_args == {"documents": 500, "stderr": 0.01}
    for version in (scored.teacher, scored.student, scored.variants["int8-weight"]):
        assert version.digest in text
    for text_part in ("0.970 \\[0.950, 0.990\\]", "0.5000 \\[0.4804, 0.5196\\]", "## Limits", "limbeck serve still/4"):
        assert text_part in text


def test_a_version_without_a_scorecard(still: Still) -> None:
    text = model_card(still.store, still.student)
    assert ModelCard(text).data.eval_results is None
    assert "It has not been scored." in text
    assert "Its licence is not stated." in text


def test_text_from_users_is_escaped(scored: Still) -> None:
    store = scored.store
    for field in ("licence", "recipe", "author", "code_version", "teacher_licence"):
        store.client.set_model_version_tag("still", "4", f"limbeck.{field}", HOSTILE + "y" * 5000)
    text = model_card(Store(), store.get("still/4"))
    data = ModelCard(text).data
    assert data.license == "other"
    assert data.license_name.startswith("x | <script>alert(1)</script> --- # gotcha")
    body = text.split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert "<script" not in html
    assert "gotcha</h1>" not in html
    assert "javascript:b" in html
    assert 'href="javascript' not in html
    rows = [line for line in html.split("\n") if "&lt;script&gt;" in line]
    assert rows
    assert all(line.startswith(("<td>", "<p>")) for line in rows)  # in cells and lines of their own
    assert "(cut, 5,0" in text
    assert "y" * 400 not in text
