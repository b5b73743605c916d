"""Each rule of a policy: what passes, what fails, what is inconclusive, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from registry.errors import BadInput
from registry.evidence import Evidence, best_card
from registry.policy import Policy, load
from registry.records import Contamination, Overlap, Parity, Scorecard, Version
from registry.rules import judge

ONNX = Version(
    name="still",
    version=4,
    kind="onnx",
    digest="a" * 64,
    source="",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    precision="fp32",
    parent="still/2",
    teacher="still/1",
)
TORCH = ONNX.model_copy(update={"kind": "student", "parent": "still/1"})
TEACHER = "0" * 64  # what make_card is relative to


def policy(**rules: Any) -> Policy:
    return Policy.model_validate({"quality": {"min_retention": 0.8}} | rules)


def outcomes(rules: dict[str, Any], card: Scorecard | None, version: Version = TORCH) -> dict[str, str]:
    verdict = judge(policy(**rules), Evidence(version, card, teacher_digest=TEACHER))
    assert all(rule.message for rule in verdict.rules)
    return {rule.rule: rule.outcome for rule in verdict.rules}


@pytest.mark.parametrize(
    ("retention", "outcome"),
    [
        ((0.9, 0.85, 0.95), "pass"),
        ((0.9, 0.80, 1.0), "pass"),  # the limit itself
        ((0.9, 0.79, 0.99), "inconclusive"),
        ((0.8, 0.7, 0.8), "inconclusive"),
        ((0.7, 0.6, 0.79), "fail"),
        ((float("nan"), float("nan"), float("nan")), "inconclusive"),
    ],
)
def test_the_whole_interval_has_to_reach_the_limit(
    make_card: Callable[..., Scorecard], retention: tuple[float, float, float], outcome: str
) -> None:
    evidence = Evidence(TORCH, make_card(TORCH.digest, retention=retention), teacher_digest=TEACHER)
    verdict = judge(policy(), evidence)
    assert verdict.outcome == outcome
    assert verdict.rules[0].message.startswith(
        f"retention {retention[0]:.4f} [{retention[1]:.4f}, {retention[2]:.4f}], at least 0.8000 is asked"
    )


def test_a_verdict_is_bound_to_what_was_judged(make_card: Callable[..., Scorecard]) -> None:
    card, rules = make_card(TORCH.digest), policy()
    verdict = judge(rules, Evidence(TORCH, card, teacher_digest=TEACHER))
    assert (verdict.model, verdict.artifact, verdict.scorecard) == ("still/4", TORCH.digest, card.digest())
    assert (verdict.tasks_digest, verdict.prompts_digest, verdict.policy) == ("tasks", "prompts", rules.digest())


def test_what_was_not_scored_is_inconclusive(make_card: Callable[..., Scorecard]) -> None:
    for card, words in (
        (None, "it has not been scored; run: limbeck eval still/4 --tasks ... --against still/1"),
        (make_card("b" * 64), "the scorecard is of other files (bbbbbbbbbbbb, not aaaaaaaaaaaa)"),
        (make_card(TORCH.digest, relative=None), "not been scored against its teacher"),
        (make_card(TORCH.digest, teacher_digest="1" * 64), "which is not its teacher still/1"),
        (make_card(TORCH.digest, teacher_digest=TORCH.digest), "scored against itself"),
    ):
        verdict = judge(policy(), Evidence(TORCH, card, teacher_digest=TEACHER))
        assert verdict.outcome == "inconclusive"
        assert words in " ".join(rule.message for rule in verdict.rules if rule.outcome == "inconclusive")


def test_tasks_and_documents(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(TORCH.digest, documents=99)
    asked = {"min_retention": 0.8, "tasks": ["bits"], "min_documents": 99}
    assert set(outcomes({"quality": asked}, card).values()) == {"pass"}
    found = outcomes({"quality": asked | {"tasks": ["bits", "absent"], "min_documents": 100}}, card)
    assert found["quality.tasks"] == found["quality.min_documents"] == "inconclusive"
    found = outcomes({"quality": {"min_retention": 0.8, "min_task_retention": {"bits": 0.96, "absent": 0.1}}}, card)
    assert found["quality.min_task_retention.bits"] == "inconclusive"  # 0.95 to 0.99
    assert found["quality.min_task_retention.absent"] == "inconclusive"
    found = outcomes({"quality": {"min_retention": 0.8, "min_task_retention": {"bits": 0.95, "choice": 1.0}}}, card)
    assert found["quality.min_task_retention.bits"] == "pass"
    assert found["quality.min_task_retention.choice"] == "fail"


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        ("max_cost_ratio", 0.25, 0.24),
        ("max_p95_ms", 30, 29.9),
        ("max_disk_bytes", 4000, 3999),
        ("max_peak_rss_bytes", 10_000, 9_999),
        ("min_decode_tokens_per_s", 300, 301),
    ],
)
def test_cost(make_card: Callable[..., Scorecard], rule: str, passes: float, fails: float) -> None:
    card = make_card(TORCH.digest)
    assert outcomes({"cost": {rule: passes}}, card)[f"cost.{rule}"] == "pass"
    assert outcomes({"cost": {rule: fails}}, card)[f"cost.{rule}"] == "fail"
    bare = make_card(TORCH.digest, cost=None, cost_ratio=None)
    assert outcomes({"cost": {rule: passes}}, bare)[f"cost.{rule}"] == "inconclusive"
    assert list(outcomes({}, bare)) == ["quality.min_retention"]  # not asked


def test_parity(make_card: Callable[..., Scorecard], make_parity: Callable[..., Parity]) -> None:
    card = make_card(ONNX.digest)

    def found(parity: Parity | None, precision: str = "fp32", **limits: Any) -> dict[str, str]:
        version = ONNX.model_copy(update={"precision": precision})
        verdict = judge(
            policy(parity=limits), Evidence(version, card, parity, teacher_digest=TEACHER, parent_digest="r")
        )
        return {rule.rule: rule.outcome for rule in verdict.rules if rule.rule.startswith("parity")}

    assert found(make_parity()) == {"parity.required": "pass"}
    assert found(None) == {"parity.required": "inconclusive"}
    assert found(None, required=False) == {}
    assert found(make_parity(reference="another")) == {"parity.required": "inconclusive"}
    assert found(make_parity(passed=False)) == {"parity.required": "fail"}
    assert found(make_parity(passed=False), "int8") == {"parity.required": "fail"}  # broken outright
    limits = dict(max_mean_kl=0.01, min_top1_agreement=0.9, max_p99_kl=0.1, max_bits_per_byte_increase=0.05)
    names = ["parity.required", *(f"parity.{name}" for name in limits)]
    assert found(make_parity(p99_kl=0.1), **limits) == dict.fromkeys(names, "pass")
    worse = make_parity(mean_kl=0.011, top1_agreement=0.89, p99_kl=0.11, bits_per_byte=2.06)
    assert found(worse, **limits) == dict.fromkeys(names, "fail") | {"parity.required": "pass"}
    # A record from before it was measured.
    assert found(make_parity(), max_p99_kl=0.1)["parity.max_p99_kl"] == "inconclusive"
    assert found(make_parity(), required=False, max_mean_kl=0.01) == {"parity.max_mean_kl": "pass"}
    assert outcomes({}, make_card(TORCH.digest), TORCH) == {"quality.min_retention": "pass"}  # torch: not asked


def test_one_failing_rule_fails(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(TORCH.digest, retention=(0.8, 0.7, 0.9))  # inconclusive
    verdict = judge(policy(cost={"max_p95_ms": 1}), Evidence(TORCH, card, teacher_digest=TEACHER))
    assert verdict.outcome == "fail"


def test_which_scorecard_is_judged(make_card: Callable[..., Scorecard]) -> None:
    asked = policy(quality={"min_retention": 0.8, "tasks": ["bits"], "min_documents": 100}, cost={"max_p95_ms": 100})
    full = make_card(TORCH.digest)
    for newer in (
        make_card("b" * 64),
        make_card(TORCH.digest, relative=None),
        make_card(TORCH.digest, tasks=("choice",)),
        make_card(TORCH.digest, documents=10),
        make_card(TORCH.digest, cost=None),
    ):
        assert best_card(asked, TORCH, [full, newer]) == full
        assert best_card(asked, TORCH, [newer]) == newer
    newest = make_card(TORCH.digest, usd=3.0)
    assert best_card(asked, TORCH, [full, newest]) == newest
    assert best_card(asked, TORCH, []) is None


def test_policy_files(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[quality]\nmin_retention = 0.9\ntasks = ["bits"]\n\n[cost]\nmax_cost_ratio = 0.5\n')
    assert load(file) == policy(quality={"min_retention": 0.9, "tasks": ["bits"]}, cost={"max_cost_ratio": 0.5})
    for text, words in (
        ("[quality]\nmin_retantion = 0.9\n", r"policy\.toml:2: .*did you mean min_retention"),
        ("[quality]\nmin_retention = 'most'\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = 95\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = nan\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = 0.9\n[parity]\nmax_p99_kl = -1\n", r"policy\.toml:4: "),
        ("[parity]\nrequired = true\n", r"policy\.toml: it asks nothing: any version passes"),
    ):
        file.write_text(text)
        with pytest.raises(BadInput, match=words):
            load(file)
    with pytest.raises(BadInput, match="no such file"):
        load(tmp_path / "absent.toml")


def test_contamination(make_card: Callable[..., Scorecard]) -> None:
    asked = {"lineage": {"max_contamination": 0.02}}
    overlaps = {"bits": Overlap(documents=100, contaminated=2), "choice": Overlap(documents=100, contaminated=3)}
    found = outcomes(
        asked, make_card(TORCH.digest, contamination=Contamination(data_digest="d", ngram=13, tasks=overlaps))
    )
    rule = "lineage.max_contamination"
    assert found == {"quality.min_retention": "pass", f"{rule}.bits": "pass", f"{rule}.choice": "fail"}
    unknown = make_card(TORCH.digest)
    assert outcomes(asked, unknown)[rule] == "inconclusive"
    assert rule not in outcomes({}, unknown)


def test_the_licence_of_the_teacher() -> None:
    asked = policy(lineage={"require_distillation_licence": True})
    rule = "lineage.require_distillation_licence"

    def found(**changes: Any) -> tuple[str, str]:
        verdict = judge(asked, Evidence(TORCH.model_copy(update=changes), None, None))
        return next((each.outcome, each.message) for each in verdict.rules if each.rule == rule)

    assert found(licence_allows_distillation=True)[0] == "pass"
    assert found(licence_allows_distillation=False) == ("fail", "to learn from still/1: its licence forbids it")
    outcome, words = found()
    assert outcome == "inconclusive"
    assert "still/1" in words
    assert "teacher.licence_allows_distillation" in words
    assert found(kind="teacher", teacher=None)[0] == "pass"
    assert all(each.rule != rule for each in judge(policy(), Evidence(TORCH, None)).rules)


def test_a_policy_without_rules_of_lineage_is_the_one_it_was() -> None:
    assert policy().digest() == policy(lineage={}).digest()
    assert policy().digest() != policy(lineage={"max_contamination": 0.1}).digest()
    assert policy().digest().startswith("01de81b4f40f")
