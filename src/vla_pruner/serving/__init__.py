"""Policy servers: a pruned policy for evaluation harnesses that ask over a socket."""
