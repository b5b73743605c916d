"""The gate: evidence, promotion, protection, approvals."""
