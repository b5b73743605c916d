"""The commands of this room: `limbeck distill`, `limbeck data`, `limbeck cache`."""
