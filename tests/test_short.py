"""Values in messages stay short, however large they are, and it takes no time to shorten them."""

import pytest

from vla_pruner._short import cut, short


def test_small_values_are_as_ever() -> None:
    for value in (3, 0.25, "fastv", ["a", "b"], {"keep": 0.5}, None, (1, 2)):
        assert short(value) == repr(value)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**5)), {n: "y" * 99 for n in range(99)}]
)
def test_large_values_fit_into_a_line(value: object) -> None:
    assert 10 < len(short(value)) <= 160


def test_nested_references_do_not_unfold() -> None:
    value: list = ["lol"]
    for _ in range(100):
        value = [value] * 10
    assert len(short(value)) <= 160
    own: list = []
    own.append(own)
    assert "..." in short(own)


def test_a_value_that_cannot_be_shown_is_named() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Broken" in short(Broken())
    assert len(short(10**5000)) <= 160


def test_the_middle_is_left_out() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 50 + "b" * 50, 21) == "aaaaaaaa ... bbbbbbbb"
