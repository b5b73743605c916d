"""Each rule of a policy: what passes, what fails, what is inconclusive, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput
from limbeck.registry.gate.approvals import signature_payload
from limbeck.registry.gate.evidence import Evidence, best_scorecard
from limbeck.registry.gate.rules.judge import apply_policy
from limbeck.registry.policy.file import load_policy
from limbeck.registry.policy.schema import Policy
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import Approval, Contamination, Estimate, Overlap, Parity, Request, Scorecard, Version
from tests import ROOT

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
    verdict = apply_policy(policy(**rules), Evidence(version, card, teacher_digest=TEACHER))
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
    verdict = apply_policy(policy(), evidence)
    assert verdict.outcome == outcome
    assert verdict.rules[0].message.startswith(
        f"retention {retention[0]:.4f} [{retention[1]:.4f}, {retention[2]:.4f}], at least 0.8000 is asked"
    )


def test_a_verdict_is_bound_to_what_was_judged(make_card: Callable[..., Scorecard]) -> None:
    card, rules = make_card(TORCH.digest), policy()
    verdict = apply_policy(rules, Evidence(TORCH, card, teacher_digest=TEACHER))
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
        verdict = apply_policy(policy(), Evidence(TORCH, card, teacher_digest=TEACHER))
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
        verdict = apply_policy(
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
    verdict = apply_policy(policy(cost={"max_p95_ms": 1}), Evidence(TORCH, card, teacher_digest=TEACHER))
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
        assert best_scorecard(asked, TORCH, [full, newer]) == full
        assert best_scorecard(asked, TORCH, [newer]) == newer
    newest = make_card(TORCH.digest, usd=3.0)
    assert best_scorecard(asked, TORCH, [full, newest]) == newest
    assert best_scorecard(asked, TORCH, []) is None


def test_policy_files(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[quality]\nmin_retention = 0.9\ntasks = ["bits"]\n\n[cost]\nmax_cost_ratio = 0.5\n')
    assert load_policy(file) == policy(quality={"min_retention": 0.9, "tasks": ["bits"]}, cost={"max_cost_ratio": 0.5})
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
            load_policy(file)
    with pytest.raises(BadInput, match="no such file"):
        load_policy(tmp_path / "absent.toml")


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
        verdict = apply_policy(asked, Evidence(TORCH.model_copy(update=changes), None, None))
        return next((each.outcome, each.message) for each in verdict.rules if each.rule == rule)

    assert found(licence_allows_distillation=True)[0] == "pass"
    assert found(licence_allows_distillation=False) == ("fail", "to learn from still/1: its licence forbids it")
    outcome, words = found()
    assert outcome == "inconclusive"
    assert "still/1" in words
    assert "teacher.licence_allows_distillation" in words
    assert found(kind="teacher", teacher=None)[0] == "pass"
    assert all(each.rule != rule for each in apply_policy(policy(), Evidence(TORCH, None)).rules)


def test_a_policy_without_rules_of_lineage_is_the_one_it_was() -> None:
    assert policy().digest() == policy(lineage={}).digest()
    assert policy().digest() != policy(lineage={"max_contamination": 0.1}).digest()
    assert policy().digest().startswith("01de81b4f40f")


def test_an_old_policy_keeps_its_digest() -> None:
    old = policy(quality={"min_retention": 0.8, "confidence": 0.95, "margin": {}}, licence={}, approvals={}, rules={})
    assert old.digest() == policy().digest()
    for more in ({"licence": {"data": ["mit"]}}, {"approvals": {"needed": 1}}, {"rules": {"a": {}}}):
        assert policy(**more).digest() != policy().digest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[approvals]\nneeded = 3\npeople = ["a", "b"]\n',
            r":2 and 3: .* 3 people, .* names 2, so no model",
        ),
        ('[approvals]\npeople = ["a"]\n', r"needed is 0"),
        ('[approvals]\nneeded = 1\npeople = ["a", "a"]\n', r":3: approvals.people names a twice"),
        (f'[approvals]\nneeded = 1\npeople = ["a"]\n[approvals.keys]\nb = "{"A" * 43}="\n', r":3 and 5: .* a key of b"),
        ('[approvals]\nneeded = 1\n[approvals.keys]\nb = "no key"\n', r":4: .* no public key"),
        (f'[approvals]\nneeded = 1\n[approvals.keys]\na = "{"A" * 43}="\nb = "{"A" * 43}="\n', r":4 and 5: .* one key"),
        (f'[approvals]\nneeded = 2\n[approvals.keys]\na = "{"A" * 43}="\n', r":2 and 3: .* keys of 1, so no model"),
        ("[licence]\nteacher = []\n", r":2: licence.teacher allows no licence, so no model"),
        ('[quality]\ntasks = ["a", "a"]\n', r":2: quality.tasks names a twice"),
        ("[quality]\nconfidence = 1\n", r":2: "),
        ("[quality]\nconfidence = 0.9\nmargin = {acc = 0}\n", r":3: "),
        ("[quality.min_task_retention]\na = 95\n", r":2: "),
        ("[cost]\nmin_decode_tokens_per_s = inf\n", r":2: "),
        ('[override]\npeople = ["a"]\n', "it asks nothing"),
        ("[rules.absent]\nx = 1\n", r":1: no rule absent is installed"),
    ],
)
def test_a_policy_that_nobody_or_anybody_passes(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadInput, match=words):
        load_policy(tmp_path / "policy.toml")


def messages(rules: dict[str, Any], evidence: Evidence) -> dict[str, tuple[str, str]]:
    return {
        each.rule: (each.outcome, each.message) for each in apply_policy(Policy.model_validate(rules), evidence).rules
    }


def test_margins(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(TORCH.digest)
    assert card.relative is not None
    worse = Estimate(value=-0.02, low=-0.03, high=-0.01, degrees_of_freedom=30)
    for higher, difference in (
        (True, worse),
        (False, Estimate(value=0.02, low=0.01, high=0.03, degrees_of_freedom=30)),
    ):
        tasks = {name: task.model_copy(update={"higher_is_better": higher}) for name, task in card.tasks.items()}
        relative = card.relative.model_copy(update={"difference": dict.fromkeys(tasks, difference)})
        held = Evidence(TORCH, card.model_copy(update={"tasks": tasks, "relative": relative}), teacher_digest=TEACHER)
        for margin, outcome in ((0.03, "pass"), (0.025, "inconclusive"), (0.009, "fail")):
            found = messages({"quality": {"margin": {"acc": margin}}}, held)
            assert {name: each[0] for name, each in found.items()} == dict.fromkeys(
                ("quality.margin.bits", "quality.margin.choice"), outcome
            )
        assert (
            "documents in place of 500"
            in messages({"quality": {"margin": {"acc": 0.025}}}, held)["quality.margin.bits"][1]
        )
        # A task's own margin counts before its metric's; what was not scored is not passed over.
        found = messages({"quality": {"margin": {"bits": 0.03, "acc": 0.009, "absent": 1}}}, held)
        assert [found[f"quality.margin.{name}"][0] for name in ("bits", "choice", "absent")] == [
            "pass", "fail", "inconclusive",
        ]  # fmt: skip
        at = {"quality": {"margin": {"acc": 0.029}, "confidence": 0.9}}
        assert messages(at, held)["quality.margin.bits"][0] == "pass"
        assert messages({"quality": at["quality"] | {"confidence": 0.99}}, held)["quality.margin.bits"][0] != "pass"


def test_the_age_of_a_score(make_card: Callable[..., Scorecard]) -> None:
    asked = {"quality": {"max_age_days": 30}}
    for day, outcome in ((31, "pass"), (32, "inconclusive")):
        now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day - 1)
        found = messages(asked, Evidence(TORCH, make_card(TORCH.digest), judged_at=now))
        assert found["quality.max_age_days"][0] == outcome
        assert "scored on 2026-01-01, at most 30 days ago" in found["quality.max_age_days"][1]
    future = Evidence(TORCH, make_card(TORCH.digest), judged_at=datetime(2025, 12, 1, tzinfo=UTC))
    assert messages(asked, future)["quality.max_age_days"][0] == "inconclusive"
    assert messages(asked, Evidence(TORCH, None))["scorecard"][0] == "inconclusive"


def test_the_upper_end_of_a_cost(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(TORCH.digest)
    assert card.relative is not None
    spread = {"cost_ratio_interval": Estimate(value=0.25, low=0.2, high=0.4)}
    held = Evidence(TORCH, card.model_copy(update={"relative": card.relative.model_copy(update=spread)}))
    for limit, outcome in ((0.4, "pass"), (0.3, "inconclusive"), (0.19, "fail")):
        assert messages({"cost": {"max_cost_ratio": limit}}, held)["cost.max_cost_ratio"][0] == outcome
    assert messages({"cost": {"max_peak_device_bytes": 1}}, held)["cost.max_peak_device_bytes"][0] == "pass"


def test_licences() -> None:
    def found(allowed: list[str], licence: str | None, role: str = "teacher") -> str:
        terms = (LineageLicence(role, "still/4", "still/1", licence, None),)  # type: ignore[arg-type]
        return messages({"licence": {role: allowed}}, Evidence(TORCH, None, lineage_licences=terms))[f"licence.{role}"][
            0
        ]

    for role in ("teacher", "data"):
        assert found(["apache-2.0"], "Apache 2.0", role) == "pass"
        assert found(["apache-2.0"], "llama2", role) == "fail"
        assert found(["apache-2.0"], "Apache-2.0 AND llama2", role) == "fail"
        assert found(["apache-2.0"], "Apache-2.0 OR llama2", role) == "pass"
        assert found(["apache-2.0"], None, role) == "inconclusive"
    assert messages({"licence": {"teacher": ["mit"]}}, Evidence(TORCH, None))["licence.teacher"][0] == "inconclusive"


def test_approvals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    made = TORCH.model_copy(update={"author": "ann"})
    asked = Request(
        name="still", alias="production", version=4, artifact=made.digest, who="bob", when=now, reason="better"
    )
    draft = Approval(
        request=asked.digest(), artifact=made.digest, verdict=None, answer="approve", who="", when=now, reason="fine"
    )

    def found(*answers: Approval, request: Request | None = asked, **rules: Any) -> str:
        held = Evidence(made, None, request=request, approvals=answers)
        return messages({"approvals": {"needed": 1} | rules}, held)["approvals.needed"][0]

    def by(who: str, **changes: Any) -> Approval:
        return draft.model_copy(update={"who": who} | changes)

    later = now + timedelta(hours=1)
    assert found(by("cy")) == "pass"
    assert found(by("ann")) == found(by("bob")) == found() == "inconclusive"  # the author, who asked
    assert found(by("cy"), people=["dee"]) == "inconclusive"
    assert found(by("cy"), by("cy", when=later), needed=2) == "inconclusive"  # one person is one
    assert found(by("cy"), by("dee"), needed=2) == "pass"
    assert found(by("cy"), by("dee", answer="reject", when=later)) == "fail"
    assert found(by("cy", answer="reject"), by("cy", when=later)) == "pass"
    assert found(by("cy", artifact="b" * 64)) == found(by("cy", request="other")) == "inconclusive"
    assert found(by("cy"), request=None) == "inconclusive"
    assert found(by("cy"), request=asked.model_copy(update={"artifact": "b" * 64})) == "inconclusive"
    key = signing.create_key(tmp_path / "key")
    assert found(by("cy"), keys={"cy": key}) == "inconclusive"
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "key"))
    signature = signing.sign(signature_payload(by("cy")))
    assert signature is not None
    given = by("cy", **signature._asdict())
    assert found(given, keys={"cy": key}) == "pass"
    assert found(given.model_copy(update={"reason": "changed"}), keys={"cy": key}) == "inconclusive"
    assert found(given, keys={"cy": signing.create_key(tmp_path / "other")}) == "inconclusive"


def test_the_page_of_policies_has_every_key(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "policy.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "policy.toml").write_text(example)
    asked = load_policy(tmp_path / "policy.toml")
    for name in set(Policy.model_fields) - {"rules"}:  # a rule in Python needs a distribution
        assert getattr(asked, name).model_fields_set == set(type(getattr(asked, name)).model_fields), name
