"""The ledger of alias moves: `log` writes it, `chain` checks it, `anchor` fixes its order, `lock` orders the moves."""
