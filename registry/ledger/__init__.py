"""The ledger of alias moves: chained by hash, anchored, locked."""
