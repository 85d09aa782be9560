"""One closed-loop episode: a policy under a condition acts in a scene."""
