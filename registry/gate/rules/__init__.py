"""The rules of a policy, each judged on evidence."""
