"""The whole loop on what is already on this machine: a recipe, a policy and the teacher they start from."""
