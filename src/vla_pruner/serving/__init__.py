"""Policy servers: a policy with a pruning method, for evaluation harnesses that ask over a socket."""
