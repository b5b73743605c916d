"""What `limbeck doctor` checks and repairs. Start at `checks`."""
