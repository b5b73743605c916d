"""Statistics: estimates, retention, non-inferiority, paired comparison."""
