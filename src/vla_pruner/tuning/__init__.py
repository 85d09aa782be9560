"""Which budget is safe, from recorded observations: what pruning does to the actions."""
