"""The tiny world's transparent pair: whether pictures come back from their latents, and what their offset costs.

`python tasks.py test` looks at one picture of each material, `python tasks.py test-full` at more.
"""

from collections import defaultdict
from functools import cache
from statistics import fmean

import pytest

from lib_layerdiffuse.cli.metrics import over_backgrounds, psnr
from lib_layerdiffuse.images.rgba import GREY, compose
from lib_layerdiffuse.methods import Family
from tests.training.world import HELD_OUT, rgba_of, runner_of
from training.scenes import to_image

FEW, MANY, ALL = range(6), range(16), range(64)  # each six of them have all materials
FULL = pytest.mark.full


@cache
def there_and_back(index, passes, offset):
    runner = runner_of(Family.SDXL)  # of both: they have one VAE and one pair
    made = HELD_OUT[index]
    truth, grey = rgba_of(made), compose(rgba_of(made), GREY)
    plain = runner.backend.posterior(grey)[0]
    latent = runner.encode(to_image(made.rgba)) if offset else plain
    answer = runner.decode(latent, passes=passes)
    return {
        "psnr": fmean(psnr(*pair) for pair in zip(over_backgrounds(truth), over_backgrounds(answer))),
        "alpha": (truth - answer)[:, 3].abs().mean().item(),
        "harm": psnr(grey, runner.backend.pixels(plain)) - psnr(grey, runner.backend.pixels(latent)),
    }


def mean(name, passes, offset, indices):
    return fmean(there_and_back(index, passes, offset)[name] for index in indices)


@pytest.mark.parametrize(
    ("passes", "indices", "psnr", "alpha"), [(1, FEW, 31, 0.025), pytest.param(8, ALL, 32, 0.02, marks=FULL)]
)
def test_pictures_come_back(passes, indices, psnr, alpha):
    assert mean("psnr", passes, True, indices) >= psnr
    assert mean("alpha", passes, True, indices) <= alpha
    assert mean("harm", passes, True, indices) <= 0.5


@FULL
def test_pictures_of_every_material_come_back():
    of_material = defaultdict(list)
    for index in ALL:
        of_material[HELD_OUT[index].material].append(index)
    of_all = mean("psnr", 8, True, ALL)
    below = {material: of_all - mean("psnr", 8, True, indices) for material, indices in of_material.items()}
    assert below.pop("hairy") <= 6.5  # wanted: 4; training/README.md says why
    assert max(below.values()) <= 4


@pytest.mark.parametrize("indices", [FEW, pytest.param(MANY, marks=FULL)], ids=["few", "many"])
def test_the_offset_tells_something(indices):
    """Little: this world has so few colours that most can be guessed from a picture over grey."""
    assert mean("psnr", 1, True, indices) > mean("psnr", 1, False, indices) + 0.1


@FULL
def test_eight_passes_beat_one():
    assert mean("psnr", 8, True, MANY) > mean("psnr", 1, True, MANY)
