"""Pruning inside a running decoder: hooks, passes, scores and what is remembered of an episode."""
