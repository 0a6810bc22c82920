"""A job of Differential Diffusion, in a host reduced to what it asks of one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import ResizeMode
from lib_layerdiffuse.request.differential import Change, labelled
from lib_layerdiffuse.webui.differential_session import ChangeSession
from lib_layerdiffuse.webui.outputs import mark

SIZE = (64, 64)


class SmallHost:
    """Keeps what it is given; samples two pictures of `size`."""

    def __init__(self, inits, *, given_mask=None, mode=ResizeMode.JUST_RESIZE, region=None, size=SIZE):
        self.inits, self.given_mask, self.mode, self.box, self.picture_size = inits, given_mask, mode, region, size
        self.notes, self.extras, self.held = [], [], []
        self.takes_over = None
        self.sampled_steps = 4

    def init_images(self, p):
        return self.inits

    def flat_init(self, p, index):
        return self.inits[index].convert("RGB")

    def mask(self, p):
        return self.given_mask

    def set_mask(self, p, mask):
        self.given_mask = mask

    def restore_mask(self, p):
        self.given_mask = None

    def init_mode(self, p):
        return self.mode

    def steps(self, p):
        return self.sampled_steps

    def size(self, p):
        return self.picture_size

    def region(self, p):
        return self.box

    def refiner(self, p):
        return self.takes_over

    def note(self, p, text):
        self.notes.append(text)

    def around_sampling(self, p, owner, around, finished):
        width, height = (side // 8 for side in self.picture_size)
        x, noise = torch.zeros(len(self.inits), 4, height, width), torch.ones(len(self.inits), 4, height, width)
        with around(x, noise):
            finished(x)

    def hold(self, p, original, noise, released):
        self.held.append((original, noise, released))
        return nullcontext()

    def pictures(self, processed):
        return processed.images

    def save_extra(self, p, processed, index, picture, name):
        self.extras.append((index, picture, name))


def half(white_from, size=SIZE):
    """White from this column on."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle((white_from, 0, size[0], size[1]), 255)
    return image


def cut_out(left):
    """Opaque from this column on."""
    image = Image.new("RGBA", SIZE, (200, 30, 30, 0))
    image.putalpha(half(left))
    return image


def change(**names):
    return Change.parse([names])


def test_host_gets_the_map_as_a_mask_that_is_white_from_one_step_s_worth_on():
    host = SmallHost([Image.new("RGB", SIZE)])
    ramp = Image.linear_gradient("L").rotate(90).resize(SIZE)
    ChangeSession(host, None, change(map_image=ramp))
    levels = [host.given_mask.getpixel((column, 0)) for column in range(64)]
    assert levels == sorted(levels) and levels[0] < 255
    assert all(level == 255 for column, level in enumerate(levels) if ramp.getpixel((column, 0)) >= 64)


def test_sampling_is_held_by_the_map_at_the_size_of_the_latent():
    host = SmallHost([Image.new("RGB", SIZE)])
    ChangeSession(host, None, change(map_image=half(32))).before_sampling(None)
    [(original, noise, released)] = host.held
    assert original.sum() == 0 and noise.mean() == 1
    assert torch.equal(released([1.0, 0.0], 1.0)[0, 0], (torch.arange(8) >= 4).expand(8, 8))


def test_of_a_region_only_that_part_of_the_map_counts():
    host = SmallHost([Image.new("RGB", SIZE)], region=(32, 0, 64, 32))
    ChangeSession(host, None, change(map_image=half(48))).before_sampling(None)
    [(_, _, released)] = host.held
    assert torch.equal(released([1.0, 0.5, 0.0], 0.5)[0, 0, 4], torch.arange(8) >= 4)


def test_each_picture_is_held_by_its_own_map_and_overlaid_by_its_own_mask():
    inits = [cut_out(16), cut_out(48)]
    host = SmallHost(inits)
    session = ChangeSession(host, None, change(source="Alpha: inside", softness=0))
    session.before_sampling(None)
    [(_, _, released)] = host.held
    free = released([1.0, 0.0], 1.0)
    assert free[0, 0, 0].tolist() == [False] * 2 + [True] * 6
    assert free[1, 0, 0].tolist() == [False] * 6 + [True] * 2
    overlays = [session.overlay(None, index, Image.new("RGBA", SIZE)) for index in range(2)]
    assert [overlay.getpixel((32, 0)) for overlay in overlays] == [(200, 30, 30, 0), (200, 30, 30, 255)]
    assert [host.given_mask.getpixel((column, 0)) for column in (8, 32, 60)] == [0, 255, 255]


def test_one_picture_keeps_the_host_s_overlay_and_none_stays_none():
    overlay = Image.new("RGBA", SIZE)
    one = ChangeSession(SmallHost([cut_out(16)]), None, change(source="Alpha: edges"))
    assert one.overlay(None, 0, overlay) is overlay
    two = ChangeSession(SmallHost([cut_out(16), cut_out(48)]), None, change(source="Alpha: edges"))
    assert two.overlay(None, 0, None) is None


def test_a_fan_is_shown_with_its_strengths_over_a_checkerboard_where_it_is_transparent():
    host = SmallHost([Image.new("RGB", SIZE)])
    session = ChangeSession(host, None, change(source="Strength fan", columns=4))
    pictures = [Image.new("RGB", SIZE, (9, 9, 9)), mark(Image.new("RGBA", SIZE))]
    hidden_infotext = Image.new("RGBA", SIZE, (9, 9, 9, 254))
    session.finish(SimpleNamespace(denoising_strength=0.8), SimpleNamespace(images=[*pictures, hidden_infotext]))
    assert [(index, name) for index, _, name in host.extras] == [(i, "strengths") for i in range(3)]
    plain, transparent, opaque = (picture for _, picture, _ in host.extras)
    assert plain.height > 64 and plain.getpixel((5, 5)) == opaque.getpixel((5, 5)) == (9, 9, 9)
    assert transparent.getpixel((5, 5)) != transparent.getpixel((20, 5))
    assert host.given_mask is None


def test_other_maps_show_nothing_more_and_put_the_mask_back():
    host = SmallHost([Image.new("RGB", SIZE)])
    ChangeSession(host, None, change(map_image=half(32))).finish(None, SimpleNamespace(images=[Image.new("RGB", SIZE)]))
    assert host.extras == [] and host.given_mask is None


def test_a_refiner_is_noted():
    host = SmallHost([Image.new("RGB", SIZE)])
    host.takes_over = "refiner at 0.8 of the steps"
    ChangeSession(host, None, change(map_image=half(32)))
    assert host.notes == ["Differential Diffusion ends where the refiner takes over: refiner at 0.8 of the steps."]


def test_what_the_steps_cannot_tell_apart_is_noted_once():
    host = SmallHost([Image.new("RGB", SIZE)] * 2)
    host.sampled_steps = 3
    session = ChangeSession(host, None, change(source="Strength fan", columns=5))
    assert len(host.notes) == 1 and "3 steps of sampling make 4 different results of 5 columns" in host.notes[0]
    session.finish(SimpleNamespace(denoising_strength=0.9), SimpleNamespace(images=[Image.new("RGB", (400, 9))]))
    [(_, shown, _)] = host.extras
    assert shown == labelled(Image.new("RGB", (400, 9)), ["0.00", "0.30", "0.30", "0.60", "0.90"])


def test_a_map_of_which_no_cell_changes_is_refused_when_it_is_sampled():
    """A spot that is white, but small."""
    spot = Image.new("L", SIZE)
    spot.paste(255, (0, 0, 2, 2))
    host = SmallHost([Image.new("RGB", SIZE)])
    with pytest.raises(LayerDiffuseError, match=r"too dark.*With 4 steps .* to be 0\.25 of white, and is 0\.06"):
        ChangeSession(host, None, change(map_image=spot)).before_sampling(None)


def test_latents_that_are_enlarged_are_refused():
    with pytest.raises(LayerDiffuseError, match="this resize mode enlarges its latents"):
        ChangeSession(SmallHost([Image.new("RGB", SIZE)], mode=None), None, change(map_image=half(32)))
