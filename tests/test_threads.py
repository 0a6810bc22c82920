"""Threads of our own."""

import _thread
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import ReferenceDecoder, random_state_dict

from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.threaded import ThreadedDecoder
from lib_layerdiffuse.nets.threads import Threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def number_of_a_new_thread():
    """How many threads of torch's a thread has that is born now."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(torch.get_num_threads).result()


def test_as_many_as_torch_has_and_torch_has_one_in_each():
    meeting = threading.Barrier(3, timeout=30)
    found = []

    def work():
        meeting.wait()  # three at once
        torch.ones(2**16).exp()
        found.append(torch.get_num_threads())

    def lead():
        threads.run([work] * 3)
        torch.ones(2**16).exp()
        return torch.get_num_threads()

    threads = Threads()
    assert threads.lead(lead) == 1
    assert found == [1, 1, 1]
    torch.set_num_threads(3)  # which threads born later begin with
    assert threads.lead(lead) == 1
    assert found == [1] * 6


@pytest.mark.parametrize("number", [3, 2])
def test_all_other_threads_keep_their_number(number):
    """Also where the one that has the work done has another than those that are born."""
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 3
        other.submit(torch.set_num_threads, number).result()
        torch.set_num_threads(3)
        threads = other.submit(Threads).result()
        assert threads.count == number
        found = [number_of_a_new_thread()]
        threads.lead(lambda: threads.run([lambda: found.append(number_of_a_new_thread())]))
        assert [*found, number_of_a_new_thread(), torch.get_num_threads()] == [3] * 4
        assert other.submit(torch.get_num_threads).result() == number


def test_threads_that_are_born_while_a_picture_is_decoded_keep_their_number():
    found = []

    class Watched(ThreadedDecoder):
        def _by_strips(self, *args, **more):
            found.append(number_of_a_new_thread())
            return super()._by_strips(*args, **more)

    decoder = Watched(TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(layers=1))))
    with torch.no_grad():
        decoder(torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8))
    assert set(found) == {3}


def test_a_leader_for_whom_nobody_waits_ends():
    interrupted, over, worked = threading.Event(), threading.Event(), []

    def lead():
        _thread.interrupt_main()
        interrupted.wait(30)
        try:
            threads.run([lambda: worked.append(1)])
        finally:
            over.set()

    threads = Threads()
    with pytest.raises(KeyboardInterrupt):
        threads.lead(lead)
    interrupted.set()
    assert over.wait(30)
    assert not worked


def test_an_error_is_raised_when_all_have_ended():
    ended = []

    def works():
        def failing():
            raise RuntimeError("out of memory")

        yield failing
        yield from [lambda: ended.append(1)] * 5

    threads = Threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        threads.lead(lambda: threads.run(works()))
    assert len(ended) == 5
    threads.lead(lambda: threads.run([lambda: ended.append(1)]))  # and the next works
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
