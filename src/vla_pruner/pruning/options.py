"""Refuse options outside their range, with a sentence."""

from __future__ import annotations


def require_int(option: str, value: object, least: int) -> None:
    """Refuse an option that is no integer of at least `least` (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{option}={value!r}` must be an integer of at least {least}.")


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not one of `choices` (ValueError)."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{option}={value!r}` is unknown; use one of {listed}.")
