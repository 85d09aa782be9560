"""The words of `vla-pruner`, one file each; those about a run of episodes are in `runs`."""
