"""The leaderboard: its rows, ranking, columns and page."""
