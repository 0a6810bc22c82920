"""Memory that is used again."""

import pytest
import torch

from lib_layerdiffuse.nets.scratch import Blocks


@pytest.fixture
def blocks():
    return Blocks(torch.device("cpu"))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_given_back_by_a_view_is_taken_again(blocks, precision):
    taken = blocks.take(torch.float32, 4, 6, 10)
    address = taken.data_ptr()
    blocks.give_back(taken.permute(2, 0, 1)[None])
    again = blocks.take(precision, 4, 6 if precision == torch.float32 else 12, 10)
    assert again.data_ptr() == address
    assert again.dtype == precision


def test_nobody_gets_what_another_has(blocks):
    a, b = blocks.take(torch.float32, 100), blocks.take(torch.float32, 100)
    blocks.give_back(a)
    found = {blocks.take(torch.float32, 100).data_ptr() for _ in range(2)}
    assert a.data_ptr() in found
    assert len(found) == 2
    assert b.data_ptr() not in found


def test_the_smallest_that_fits_and_is_not_much_too_large(blocks):
    sizes = [1000, 120, 110, 90]
    taken = [blocks.take(torch.float32, size) for size in sizes]
    addresses = {size: each.data_ptr() for size, each in zip(sizes, taken)}
    blocks.give_back(*taken)
    assert blocks.take(torch.float32, 100).data_ptr() == addresses[110]
    assert blocks.take(torch.float32, 100).data_ptr() == addresses[120]
    assert blocks.take(torch.float32, 100).data_ptr() not in addresses.values()
    assert blocks.take(torch.float32, 100, at_most=float("inf")).data_ptr() == addresses[1000]
