"""The commands of this room: `limbeck export`, `serve`, `deploy`, `generate`."""
