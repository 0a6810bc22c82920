"""Weight and Stop At, against the picture that Forge makes without the extension."""

import pytest

from tests.forge.client import SD15_ATTENTION, SDXL_ATTENTION, all_different, alpha_varies, layerdiffuse, same

SDXL = pytest.mark.sdxl
FAMILIES = (("sd15", SD15_ATTENTION), pytest.param("sdxl", SDXL_ATTENTION, marks=SDXL))


@pytest.mark.parametrize(("family", "method"), FAMILIES)
def test_off_is_a_forge_without_the_extension(forge, plain_pictures, family, method):
    before = forge.picture()
    forge.picture(layerdiffuse(method))
    after = forge.picture()
    assert same(before, plain_pictures[family])
    assert same(after, plain_pictures[family])


def test_off_with_another_method_chosen_is_off_too(forge, plain_pictures):
    arguments = {"LayerDiffuse": {"args": [False, SDXL_ATTENTION]}}
    assert same(forge.picture(alwayson_scripts=arguments), plain_pictures["sd15"])


def test_off_in_a_batch(forge, plain_pictures):
    assert same(forge.picture(batch_size=2, seed=5), plain_pictures["sd15 batch"])


@pytest.mark.parametrize(("family", "method"), FAMILIES)
@pytest.mark.parametrize("strength", [{"weight": 0.0}, {"stop": 0.0}], ids=["weight 0", "stop at 0"])
def test_nothing_injected_is_the_plain_picture_with_an_alpha(forge, plain_pictures, family, method, strength):
    answer = forge.txt2img(layerdiffuse(method, **strength))
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0])
    assert same(answer.images[1], plain_pictures[family])


def test_weights_differ(forge):
    pictures = [forge.picture(layerdiffuse(SD15_ATTENTION, weight=weight)) for weight in (0.0, 0.5, 1.0)]
    assert all_different(pictures)


@pytest.mark.full
def test_stopping_half_way_differs_from_both_ends(forge, plain_pictures):
    opaque = {
        stop: forge.txt2img(layerdiffuse(SD15_ATTENTION, stop=stop), steps=4).images[1] for stop in (0.0, 0.5, 1.0)
    }
    assert same(opaque[0.0], plain_pictures["sd15 4 steps"])
    assert all_different(list(opaque.values()))


@pytest.mark.full
@SDXL
def test_stopping_half_way_sdxl(forge):
    pictures = [forge.picture(layerdiffuse(SDXL_ATTENTION, stop=stop), steps=4) for stop in (0.0, 0.5, 1.0)]
    assert all_different(pictures)
