"""The commands of this room: `limbeck eval`, `tasks`, `compare`, `leaderboard`, `verdict`, `models diff`."""
