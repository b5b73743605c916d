"""Scores: the lm-eval run, scorecards, candidates, comparisons."""
