"""What a rule of your own needs: a function of `Evidence` that returns a `RuleResult`. See docs/policy.md."""

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.records import RuleResult

__all__ = ["Evidence", "RuleResult"]
