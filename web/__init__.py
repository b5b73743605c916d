"""The pages for people who would rather look: leaderboard, model, comparison, history, promotion and rollback."""
