"""The tiny world that ships with the extension, and scenes to measure it on."""

from functools import cache

import torch

from lib_layerdiffuse.cli.models import open_world
from training.scenes import scene

SEED = 1000  # no training saw it
SIZE = 128
HELD_OUT = [scene(index, SEED, SIZE, held_out=True) for index in range(64)]


@cache
def runner_of(family):
    runner = open_world(family)
    runner.backend.pipeline.set_progress_bar_config(disable=True)
    return runner


def rgba_of(made):
    return torch.from_numpy(made.rgba).permute(2, 0, 1)[None]
