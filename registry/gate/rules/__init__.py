"""The rules of a policy, applied to the evidence about a version: one module for each kind of rule."""
