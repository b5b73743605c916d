"""Evaluation of quality and cost: lm-eval over any model, cost, statistics, scorecards, leaderboards, verdicts."""
