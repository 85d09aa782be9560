"""Scores and the search of Algorithms 1 and 2 once more: in C for the CPU, in Triton for a GPU."""
