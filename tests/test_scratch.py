"""Memory that is used again."""

import threading

import pytest
import torch

from lib_layerdiffuse.nets.scratch import PAGE, Blocks, Scratch

SEVERAL = 10 * PAGE


@pytest.fixture
def blocks():
    return Blocks()


def take(blocks, size):
    return blocks.take(torch.uint8, size)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_given_back_by_a_view_is_taken_again(blocks, precision):
    taken = blocks.take(torch.float32, 4, 6, 10)
    address = taken.data_ptr()
    blocks.give_back(taken.permute(2, 0, 1)[None])
    again = blocks.take(precision, 4, 6 if precision == torch.float32 else 12, 10)
    assert again.data_ptr() == address
    assert again.dtype == precision


def test_nobody_gets_what_another_has(blocks):
    """Blocks of many sizes, taken and given back by turns, keep what was written into them."""
    generator = torch.Generator().manual_seed(0)
    held = {}
    for number in range(300):
        if len(held) > 10:
            blocks.give_back(held.pop(next(iter(held))))
        size = int(torch.randint(1, SEVERAL, (), generator=generator))
        held[number] = take(blocks, size).fill_(number % 251)
        for each, block in held.items():
            assert (block == each % 251).all()


def test_the_smallest_part_that_fits(blocks):
    taken = {size: take(blocks, size * PAGE) for size in (7, 9, 10)}
    addresses = {size: each.data_ptr() for size, each in taken.items()}
    blocks.give_back(*reversed(taken.values()))
    assert take(blocks, 8 * PAGE).data_ptr() == addresses[9]
    assert take(blocks, 7 * PAGE).data_ptr() == addresses[7]
    assert take(blocks, 1).data_ptr() == addresses[9] + 8 * PAGE


def test_several_small_ones_where_a_large_one_was_and_a_large_one_again(blocks):
    large = take(blocks, 4 * PAGE)
    begin = large.data_ptr()
    blocks.give_back(large)
    small = [take(blocks, PAGE - 1) for _ in range(4)]
    assert {each.data_ptr() for each in small} == {begin + each * PAGE for each in range(4)}
    assert not begin <= take(blocks, 1).data_ptr() < begin + 4 * PAGE
    for each in (1, 3, 0, 2):  # next to nothing free, between two that are, ...
        blocks.give_back(small[each])
    assert take(blocks, 4 * PAGE).data_ptr() == begin


def test_a_piece_is_as_large_as_the_largest_block_before(blocks):
    large = take(blocks, SEVERAL)
    small = [take(blocks, PAGE) for _ in range(SEVERAL // PAGE)]
    assert len(blocks._pieces) == 2
    blocks.give_back(large, *small)
    take(blocks, SEVERAL), take(blocks, SEVERAL)
    assert len(blocks._pieces) == 2


def test_nothing_is_given_back_twice(blocks):
    block = take(blocks, 1)
    blocks.give_back(block)
    with pytest.raises(KeyError):
        blocks.give_back(block)


def test_scratch_is_the_same_memory_by_name_until_it_is_given_back(blocks):
    scratch = Scratch(blocks, torch.bfloat16)
    first = scratch("a", 2, PAGE)
    assert first.shape == (2, PAGE)
    assert first.dtype == torch.bfloat16
    assert scratch("a", PAGE).data_ptr() == first.data_ptr()
    assert scratch("b", PAGE).data_ptr() != first.data_ptr()
    scratch("a", 3, PAGE)
    assert len(blocks._taken) == 2
    scratch.give_back()
    assert not blocks._taken
    assert scratch("c", 5).shape == (5,)


def test_each_thread_has_its_own_scratch(blocks):
    scratch, found = Scratch(blocks), []
    here = scratch("a", 4).fill_(1)

    def elsewhere():
        found.append(scratch("a", 4).fill_(2).data_ptr())
        scratch.give_back()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found != [here.data_ptr()]
    assert here.tolist() == [1] * 4
    assert scratch("a", 4).data_ptr() == here.data_ptr()
