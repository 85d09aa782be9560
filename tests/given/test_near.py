"""How tests compare activations: by the size of the values, not by an absolute bound."""

import numpy as np
import pytest
import torch

from checks import near


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_the_bound_grows_with_the_values(size):
    expected = size * torch.tensor([1.0, -0.5, 1e-4])
    near(expected + 5e-6 * size, expected)
    with pytest.raises(AssertionError):
        near(expected + 2e-5 * size, expected)
    near(expected + 2e-5 * size, expected, rel=3e-5)


def test_what_it_compares():
    near(np.ones(3, np.float32), [1, 1, 1])
    near([2.0, 2.0], 2)
    masked = torch.tensor([1.0, -torch.inf])
    near(masked, masked.clone())
    for found, expected in [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(1), torch.ones(1).double()),
    ]:
        with pytest.raises(AssertionError):
            near(found, expected)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            near(torch.tensor([1.0, broken]), torch.ones(2))
