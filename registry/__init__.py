"""The bottom room: records, artifacts, MLflow, the gate and the ledger. It imports no other room."""
