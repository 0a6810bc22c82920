"""Threads of our own."""

import threading

import pytest
import torch

from lib_layerdiffuse.nets.threads import Threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_as_many_as_torch_has_and_torch_has_one_in_each():
    meeting = threading.Barrier(3, timeout=30)
    found = []

    def work():
        meeting.wait()  # three at once
        torch.ones(2**16).exp()
        found.append(torch.get_num_threads())

    threads = Threads()
    with threads.alone():
        assert torch.get_num_threads() == 1
        threads.run([work] * 3)
    assert found == [1, 1, 1]
    assert torch.get_num_threads() == 3
    threads = Threads()
    threads.run([meeting.wait] * 3)  # new threads, which have asked torch nothing
    torch.set_num_threads(3)
    threads.run([work] * 3)
    assert found == [1] * 6


def test_an_error_is_raised_when_all_have_ended():
    ended = []

    def works():
        def failing():
            raise RuntimeError("out of memory")

        yield failing
        yield from [lambda: ended.append(1)] * 5

    threads = Threads()
    with pytest.raises(RuntimeError, match="out of memory"), threads.alone():
        threads.run(works())
    assert len(ended) == 5
    assert torch.get_num_threads() == 3
    threads.run([lambda: ended.append(1)])  # and the next works
    assert len(ended) == 6


def test_each_thread_hears_when_no_work_is_left():
    ended = []
    Threads().run([lambda: ended.append("work")] * 5, after=lambda: ended.append(threading.get_ident()))
    assert ended.count("work") == 5
    assert len(ended) == 8


def test_a_work_may_have_works():
    found = []
    threads = Threads()
    threads.run([lambda: threads.run([lambda: found.append(threading.current_thread().name)] * 2)] * 8)
    assert len(found) == 16
    assert threading.current_thread().name not in found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_made_here_can_be_written_there(mode):
    weights = torch.nn.Parameter(torch.ones(4))
    with mode():
        made = torch.zeros(4)
        Threads().run([lambda: torch.add(weights, 1, out=made)])
    assert made.tolist() == [2, 2, 2, 2]
