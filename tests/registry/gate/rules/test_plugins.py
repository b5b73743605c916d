"""Rules in Python from packages that are really installed: their results, and that a broken one never passes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.policy.file import load_policy
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Version

VERSION = Version(
    name="still", version=1, kind="student", digest="a" * 64, source="", created=datetime(2026, 1, 1, tzinfo=UTC)
)
RULES = """
from __future__ import annotations
from pydantic import BaseModel, Field
from limbeck.registry.records import RuleResult

def digest(evidence, *, starts: str, least: int = 1) -> RuleResult:
    "The digest of the files starts with `starts`."
    good = evidence.version.digest.startswith(starts * least)
    return RuleResult(rule="digest", outcome="pass" if good else "fail", message=f"starts with {starts}")

class Many:
    class Options(BaseModel, extra="forbid"):
        share: float = Field(gt=0, lt=1)
    def __call__(self, evidence, share):
        yield RuleResult(rule="one", outcome="pass", message=str(share))
        yield RuleResult(rule="two", outcome="fail", message="no")

many = Many()

def raises(evidence):
    raise KeyError("gone")

def leaves(evidence):
    raise SystemExit(0)

def nothing(evidence):
    return []

def says_yes(evidence):
    return True

def forges(evidence):
    return RuleResult.model_construct(rule="forges", outcome="passed", message="fine")

number = 5
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package of rules: its metadata as pip writes it, and its module."""

    def add_to_path(name: str, module: str, text: str, rules: str) -> None:
        site = tmp_path / name
        about = site / f"{name}-1.2.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{rule} = {module}:{rule}" for rule in rules.split()]
        (about / "entry_points.txt").write_text("\n".join(["[limbeck.rules]", *lines]) + "\n")
        (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()

    return add_to_path


@pytest.fixture
def acme(install: Callable[..., None]) -> None:
    """The package acme of `RULES`."""
    install("acme", "acme_rules", RULES, "digest many raises leaves nothing says_yes forges number absent")


def rule_results(**rules: Any) -> list[tuple[str, str, str]]:
    """(rule, outcome, message) of a policy of rules in Python."""
    verdict = apply_policy(Policy(rules=rules), Evidence(VERSION, None))
    return [(each.rule, each.outcome, each.message) for each in verdict.rules]


@pytest.mark.usefixtures("acme")
def test_a_rule_gets_its_options() -> None:
    assert rule_results(digest={"starts": "a"}) == [("rules.digest", "pass", "starts with a (acme 1.2)")]
    assert rule_results(digest={"starts": "b"})[0][1] == "fail"
    assert rule_results(digest={"starts": "a", "least": 65})[0][1] == "fail"
    assert rule_results(many={"share": 0.5}) == [
        ("rules.many.one", "pass", "0.5 (acme 1.2)"),
        ("rules.many.two", "fail", "no (acme 1.2)"),
    ]


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "it raised KeyError: 'gone'"),
        ("leaves", "it raised SystemExit: 0"),
        ("nothing", "it returned no result"),
        ("says_yes", "returned a bool, not a RuleResult"),
        ("forges", "its result is invalid: input should be 'pass', 'fail' or 'inconclusive'"),
        ("absent", "the rule absent of acme 1.2 cannot be imported: AttributeError"),
        ("number", "is not a callable but a int"),
        ("elsewhere", "no rule elsewhere is installed"),
    ],
)
def test_a_broken_rule_never_passes(name: str, reason: str) -> None:
    ((rule, outcome, message),) = rule_results(**{name: {}})
    assert (rule, outcome) == (f"rules.{name}", "inconclusive")
    assert reason in message


@pytest.mark.usefixtures("acme")
def test_options_are_checked_and_errors_name_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    for text, message in (
        ("[rules.digest]\nstart = 'a'\n", r":2: unknown key rules.digest.start; did you mean starts\?"),
        ("[rules.digest]\nleast = 2\n", r":1: rules.digest.starts is missing"),
        ("[rules.digest]\nstarts = 'a'\nleast = 'x'\n", r":3: rules.digest.least: input should be a valid integer"),
        ("[rules.many]\nshare = 2\n", r":2: rules.many.share: input should be less than 1, not 2"),
        ("[rules.manny]\nshare = 0.5\n", r":1: no rule manny is installed; did you mean many\?"),
        ("[rules.absent]\n", r":1: the rule absent of acme 1.2 cannot be imported"),
    ):
        file.write_text(text)
        with pytest.raises(BadInput, match=message):
            load_policy(file)
    file.write_text("[rules.digest]\nstarts = 'a'\n")
    assert load_policy(file).digest() != Policy(rules={"digest": {"starts": "b"}}).digest()


@pytest.mark.usefixtures("acme")
def test_two_rules_of_one_name_are_inconclusive(install: Callable[..., None]) -> None:
    install("other", "other_rules", RULES, "digest")
    ((_, outcome, message),) = rule_results(digest={"starts": "a"})
    assert outcome == "inconclusive"
    assert "is in acme 1.2 (acme_rules:digest) and in other 1.2 (other_rules:digest)" in message
