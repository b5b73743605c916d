"""The commands of this room: `limbeck models`, `promote`, `rollback`, `policy`, `keys` and others."""
