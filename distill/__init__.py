"""Distillation, from teacher to student: recipes, data, the teacher cache, objectives and the training run."""
