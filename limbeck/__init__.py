"""Limbeck: distil a large language model into a small one that keeps its quality.

Public are the `limbeck` command, `limbeck.runtime` (run an exported artifact), `limbeck.rules` (rules of your own for a
policy) and MLflow's loader `limbeck.export.pyfunc`. Every other module is internal and may change at any time.
"""
