"""What needs the environment of training, which only the newest of the test environments has."""

import json
from functools import cache
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("peft") else ["*.py"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Models and weight files of random numbers, as the command line expects the tiny world's."""
    import torch

    from lib_layerdiffuse.methods import METHODS, Family
    from lib_layerdiffuse.nets.decoder import TransparentDecoder
    from lib_layerdiffuse.nets.encoder import TransparentEncoder
    from training.injection import KINDS, InjectionSettings
    from training.tiny.models import MAKERS, make_vae
    from training.trainer import save_halves

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("world")
    vae = make_vae()
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    for family, make in MAKERS.items():
        pipeline = make(vae)
        pipeline.save_pretrained(folder / family.value)
    weights = folder / "weights"
    weights.mkdir()
    decoder = TransparentDecoder((8,) * 7, 2, [False] * 4 + [True] * 3, 3, 4, 4).state_dict()
    encoder = TransparentEncoder([4, *(8,) * 8, 4]).state_dict()
    save_halves(decoder, weights / Family.SDXL.decoder)
    save_halves(encoder, weights / Family.SDXL.encoder)
    for method in METHODS:
        if not method.chain:
            pipeline = MAKERS[method.family](vae)
            pipeline.unet.requires_grad_(False)
            asked = InjectionSettings(data="", output="", model="", method=method.key, rank=4, signal=8)
            net = KINDS[method.key](pipeline.unet, asked, method)
            for weight in net.parameters():
                if weight.requires_grad:
                    weight.data += 0.05 * torch.randn_like(weight)
            save_halves(net.tensors(), weights / method.weights)
    return folder


@pytest.fixture(scope="session")
def opened():
    """Opens the included models of a family, once for all tests."""
    from lib_layerdiffuse.cli import models

    return cache(models.open_world)


@pytest.fixture
def run(world, opened, monkeypatch, tmp_path, capsys):
    """The command line in that world; its answer."""
    from lib_layerdiffuse.__main__ import main
    from lib_layerdiffuse.cli import models

    monkeypatch.setattr(models, "WORLD", world)
    monkeypatch.setattr(models, "open_world", opened)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        main([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)

    return run
