"""Measuring: time, memory and FLOPs of pruned models, and whether pruning can be trusted at all."""
