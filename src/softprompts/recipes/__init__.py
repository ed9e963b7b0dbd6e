"""Whole procedures: runs, predictions, evaluations, and comparisons of many runs, whose finished stages are reused."""
