"""Everything Limbeck keeps in MLflow; only this folder imports it. Start at `store`."""
