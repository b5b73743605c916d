"""Policy files: what is read, and which policies are refused with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.policy.file import load_policy
from limbeck.registry.policy.schema import CostLimits, Policy, QualityRules

KEY = "A" * 43 + "="


def test_a_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[quality]\nmin_retention = 0.9\ntasks = ["bits"]\n\n[cost]\nmax_cost_ratio = 0.5\n')
    quality = QualityRules(min_retention=0.9, tasks=("bits",))
    assert load_policy(file) == Policy(quality=quality, cost=CostLimits(max_cost_ratio=0.5))
    with pytest.raises(BadInput, match="no such file"):
        load_policy(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quality]\nmin_retantion = 0.9\n", r"policy\.toml:2: .*did you mean min_retention"),
        ("[quality]\nmin_retention = 'most'\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = 95\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = nan\n", r"policy\.toml:2: "),
        ("[quality]\nmin_retention = 0.9\n[parity]\nmax_p99_kl = -1\n", r"policy\.toml:4: "),
        ("[quality]\nconfidence = 1\n", r":2: "),
        ("[quality]\nconfidence = 0.9\nmargin = {acc = 0}\n", r":3: "),
        ("[quality.min_task_retention]\na = 95\n", r":2: "),
        ("[cost]\nmin_decode_tokens_per_s = inf\n", r":2: "),
        ("[rules.absent]\nx = 1\n", r":1: no rule absent is installed"),
    ],
)
def test_invalid_keys_and_values(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[parity]\nrequired = true\n", r"policy\.toml: it has no rule: any version passes"),
        ('[override]\npeople = ["a"]\n', "it has no rule"),
        ('[deploy]\naliases = ["production"]\n', "it has no rule"),
        ('[approvals]\nneeded = 3\npeople = ["a", "b"]\n', r":2 and 3: .* 3 people, .* names 2, so no model"),
        ('[approvals]\npeople = ["a"]\n', r"needed is 0"),
        ('[approvals]\nneeded = 1\npeople = ["a", "a"]\n', r":3: approvals.people names a twice"),
        (f'[approvals]\nneeded = 1\npeople = ["a"]\n[approvals.keys]\nb = "{KEY}"\n', r":3 and 5: .* a key of b"),
        ('[approvals]\nneeded = 1\n[approvals.keys]\nb = "no key"\n', r":4: .* is not a public key"),
        (f'[approvals]\nneeded = 1\n[approvals.keys]\na = "{KEY}"\nb = "{KEY}"\n', r":4 and 5: .* one key"),
        (f'[approvals]\nneeded = 2\n[approvals.keys]\na = "{KEY}"\n', r":2 and 3: .* keys of 1, so no model"),
        ("[licence]\nteacher = []\n", r":2: licence.teacher allows no licence, so no model"),
        ('[quality]\ntasks = ["a", "a"]\n', r":2: quality.tasks names a twice"),
    ],
)
def test_policies_that_every_model_or_no_model_passes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_policy(tmp_path / "policy.toml")
