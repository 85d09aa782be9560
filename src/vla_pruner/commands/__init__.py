"""The words of `vla-pruner`: one file each, and what they share."""
