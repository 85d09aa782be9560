"""Policies of other packages, pruned as they are: one file per architecture.

None of these files imports the package it serves; classes are known by name and structure.
"""
