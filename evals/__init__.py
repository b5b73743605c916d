"""How good and how dear: lm-eval over any model, cost, statistics, scorecards, leaderboards."""
