"""Measuring: time, memory, FLOPs and intervals, and whether pruning can be trusted at all."""
