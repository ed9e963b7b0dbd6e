"""Evaluation: scores, metrics, and the page that shows them."""
