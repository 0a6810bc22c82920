"""The tiny world's transparent pair: whether pictures come back from their latents, and what their offset costs."""

from collections import defaultdict
from functools import cache
from statistics import fmean

from lib_layerdiffuse.images import GREY, compose
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.metrics import over_backgrounds, psnr
from tests.training.world import HELD_OUT, rgba_of, studio_of
from training.scenes import to_image

ALL, FEW = range(64), range(16)


@cache
def there_and_back(index, passes, offset):
    studio = studio_of(Family.SDXL)  # of both: they have one VAE and one pair
    made = HELD_OUT[index]
    truth, grey = rgba_of(made), compose(rgba_of(made), GREY)
    plain = studio.host.posterior(grey)[0]
    latent = studio.encode(to_image(made.rgba)) if offset else plain
    answer = studio.decode(latent, passes=passes)
    return {
        "psnr": fmean(psnr(*pair) for pair in zip(over_backgrounds(truth), over_backgrounds(answer))),
        "alpha": (truth - answer)[:, 3].abs().mean().item(),
        "harm": psnr(grey, studio.host.pixels(plain)) - psnr(grey, studio.host.pixels(latent)),
    }


def mean(name, passes=8, offset=True, indices=ALL):
    return fmean(there_and_back(index, passes, offset)[name] for index in indices)


def test_pictures_come_back():
    of_material = defaultdict(list)
    for index in ALL:
        of_material[HELD_OUT[index].material].append(index)
    below = {material: mean("psnr") - mean("psnr", indices=indices) for material, indices in of_material.items()}
    assert mean("psnr") >= 32
    assert below.pop("hairy") <= 6.5  # wanted: 4; training/README.md says why
    assert max(below.values()) <= 4
    assert mean("alpha") <= 0.02


def test_the_offset_does_no_harm():
    assert mean("harm") <= 0.5


def test_the_offset_tells_something():
    """Little: this world has so few colours that most can be guessed from a picture over grey."""
    assert mean("psnr", 1, True, FEW) > mean("psnr", 1, False, FEW) + 0.1


def test_eight_passes_beat_one():
    assert mean("psnr", 8, True, FEW) > mean("psnr", 1, True, FEW)
