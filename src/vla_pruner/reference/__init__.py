"""The embedded reference task: a small language-conditioned pick-and-place benchmark."""
