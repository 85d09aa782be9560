"""Searches on recorded observations that give calibrated methods their recipes."""
