"""Closed-loop episodes with and without pruning: run them in pairs, compare them, show them."""
