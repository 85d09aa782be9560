"""What policies look at over an episode, and what each method would have kept of it."""
