"""The registry as web pages: leaderboard, versions, comparison, history, promotion and rollback."""
