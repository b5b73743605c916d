"""The commands of this room: `limbeck distill`, `data`, `cache`."""
