"""Judging and choosing visual tokens: pure tensor functions that know no model."""
