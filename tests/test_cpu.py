"""The decoder made fast on a processor against the plain one, and against diffusers' blocks at the released widths."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import RELEASED_WIDTHS, ReferenceDecoder, random_state_dict
from torch.nn import functional as F

from lib_layerdiffuse.cpu import FastDecoder, attention, decoder
from lib_layerdiffuse.cpu.attention import kernel, mix
from lib_layerdiffuse.cpu.threads import Team
from lib_layerdiffuse.nets.decoder import TransparentDecoder

WIDTHS = (8, 8, 16, 16, 24, 24, 32)  # none of the levels alike, so that joined channels fall on both sides of a group


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(decoder, "LARGE", 1)


@pytest.fixture(scope="module")
def net():
    return TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(WIDTHS)))


def random_input(height=128, width=64, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, height, width, generator=generator)
    return rgb, torch.randn(batch, 4, height // 8, width // 8, generator=generator)


@pytest.mark.parametrize("strip_bytes", [1, 2**15, 2**30], ids=["two rows", "some rows", "all rows"])
@pytest.mark.parametrize("found", [kernel, lambda: None], ids=["compiled", "torch alone"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_answers_as_the_network(net, monkeypatch, strip_bytes, found, mode):
    monkeypatch.setattr(decoder, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(decoder, "kernel", found)
    with mode():
        pictures = random_input(batch=2)
        torch.testing.assert_close(FastDecoder(net)(*pictures), net(*pictures), rtol=0, atol=2e-5)


@pytest.mark.parametrize("found", [kernel, lambda: None], ids=["compiled", "torch alone"])
@torch.no_grad()
def test_it_answers_as_diffusers_blocks_of_the_released_widths(monkeypatch, found):
    monkeypatch.setattr(decoder, "kernel", found)
    reference = ReferenceDecoder(RELEASED_WIDTHS)
    fast = FastDecoder(TransparentDecoder.from_state_dict(random_state_dict(reference)))
    for seed, size in enumerate([(256, 192), (64, 128)]):  # the second finds nothing of the first
        pictures = random_input(*size, seed=seed)
        torch.testing.assert_close(fast(*pictures), reference(*pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_weights_in_half_precision_are_computed_with_in_full(net, precision):
    half = TransparentDecoder.from_state_dict({key: value.to(precision) for key, value in net.state_dict().items()})
    exact = TransparentDecoder.from_state_dict({key: value.float() for key, value in half.state_dict().items()})
    answer = FastDecoder(half)(*(x.to(precision) for x in random_input()))
    expected = exact(*(x.to(precision).float() for x in random_input()))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, expected, rtol=0, atol=2e-5)


def test_weights_in_full_precision_are_not_copied(net):
    assert FastDecoder(net)._net.conv_in.weight.data_ptr() == net.conv_in.weight.data_ptr()


# --- attention ---


def torchs(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.fixture(params=[True, False], ids=["compiled", "torch alone"])
def attend(request):
    return kernel() if request.param else None


@pytest.mark.parametrize("queries", [1, 2, 17])
@pytest.mark.parametrize("keys", [1, 4, 63, 64, 66, 1100])  # up to 64 at once, four by four
def test_attention_is_torchs(queries, keys, attend):
    q, k, v = torch.randn(3, 8, queries), torch.randn(3, 8, keys), torch.randn(3, 8, keys)
    exact = torchs(*(x.double() for x in (q, k, v))).float()
    torch.testing.assert_close(mix(q, k, v, attend), exact, rtol=0, atol=5e-5)
    shared = mix(q, k + 1000, v, attend)  # what all keys share changes nothing
    torch.testing.assert_close(shared, torchs(q.double(), k.double() + 1000, v.double()).float(), rtol=0, atol=5e-3)


def test_the_kernel_is_used():
    asked = []
    mix(*torch.randn(3, 2, 8, 30), lambda *arrays: asked.append([x.shape for x in arrays]))
    assert asked == [[(2, 8, 30)] * 4]


@pytest.mark.parametrize("strength", [300.0, torch.nan])
def test_attention_beyond_float32s_exponents_is_torchs(strength):
    q, k, v = torch.randn(3, 2, 8, 30)
    expected = torchs(q * strength, k * 300, v)
    torch.testing.assert_close(mix(q * strength, k * 300, v, kernel()), expected, rtol=0, atol=1e-3, equal_nan=True)


@pytest.fixture
def first_use():
    kernel.cache_clear()
    yield
    kernel.cache_clear()


@pytest.mark.usefixtures("first_use")
@pytest.mark.parametrize("error", [ImportError, SystemError])
def test_where_numba_fails_it_is_said_and_not_tried_again(net, error, monkeypatch, caplog):
    asked = []

    class Broken:
        def find_spec(self, name, path, target=None):
            if name == "lib_layerdiffuse.cpu.kernels":
                asked.append(name)
                raise error("Numba needs NumPy 2.3 or less.")

    monkeypatch.delitem(sys.modules, "lib_layerdiffuse.cpu.kernels", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    caplog.set_level("INFO", "layerdiffuse")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(FastDecoder(net)(*random_input()), net(*random_input()), rtol=0, atol=2e-5)
    assert len(asked) == 1
    assert [record.message for record in caplog.records if "Numba needs" in record.message] == [
        f"decoding without compiled attention, which takes longer: {error.__name__}: Numba needs NumPy 2.3 or less."
    ]


@pytest.mark.usefixtures("first_use")
def test_where_no_folder_may_be_written_to_the_kernel_is_compiled_all_the_same(monkeypatch, caplog):
    from lib_layerdiffuse.cpu import kernels

    def njit(signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(kernels, "njit", njit)
    caplog.set_level("INFO", "layerdiffuse")
    assert attention.kernel() == (kernels.attend, kernels.OPTIONS)
    assert "NUMBA_CACHE_DIR" in caplog.text


# --- threads ---


def number_of_a_new_thread():
    """How many threads of torch's a thread has that is born now."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(torch.get_num_threads).result()


def test_as_many_as_torch_has_and_torch_has_one_in_each():
    found = []

    def work():
        torch.ones(2**16).exp()
        found.append(torch.get_num_threads())

    team = Team()
    team.run([work] * 6)
    torch.set_num_threads(3)  # which threads born later begin with
    team.run([work] * 6)
    assert team.size == 3
    assert found == [1] * 12


@pytest.mark.parametrize("number", [3, 2])
def test_all_other_threads_keep_their_number(number):
    """Also where the one that has the work done has another than those that are born."""
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 3
        other.submit(torch.set_num_threads, number).result()
        torch.set_num_threads(3)
        team = other.submit(Team).result()
        assert team.size == number
        found = [number_of_a_new_thread()]
        team.run([lambda: found.append(number_of_a_new_thread())])
        assert [*found, number_of_a_new_thread(), torch.get_num_threads()] == [3] * 4
        assert other.submit(torch.get_num_threads).result() == number


def test_threads_that_are_born_while_a_picture_is_decoded_keep_their_number(net):
    found = []

    class Watched(FastDecoder):
        def _by_pieces(self, *args):
            found.append(number_of_a_new_thread())
            return super()._by_pieces(*args)

    Watched(net)(*random_input())
    assert set(found) == {3}


def test_an_error_is_raised_when_all_have_ended():
    ended = []

    def failing():
        raise RuntimeError("out of memory")

    team = Team()
    with pytest.raises(RuntimeError, match="out of memory"):
        team.run([failing, *[lambda: ended.append(1)] * 5])
    assert len(ended) == 5
    team.run([lambda: ended.append(1)])  # and the next works
    assert len(ended) == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_made_here_can_be_written_there(mode):
    weights = torch.nn.Parameter(torch.ones(4))
    with mode():
        made = torch.zeros(4)
        Team().run([lambda: torch.add(weights, 1, out=made)])
    assert made.tolist() == [2, 2, 2, 2]
