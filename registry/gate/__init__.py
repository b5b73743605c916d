"""The gate: decides if an alias may move to a version. Evidence, rules, promotion, protection, approvals, audit."""
