"""The files of a job with save_images, whatever the format setting and Forge's stealth infotext would do to them."""

import io
import shutil
from statistics import mean

import pytest
from PIL import Image, ImageChops, ImageStat

from tests.forge.client import PNG_SIGNATURE, SD15_ATTENTION, SD15_JOINT, alpha_varies, layerdiffuse

# Every format and every mode at least once, and the modes that touch pixels with the format they touch.
# In avif Forge's API answers HTTP 500 ("Invalid image format") with pictures that are not ours.
SETTINGS = (
    ("png", "Alpha"),
    ("png", "RGB"),
    ("png", "None"),
    ("jpg", "Alpha"),
    ("webp", "RGB"),
    ("avif", "None"),
    pytest.param("jpg", "None", marks=pytest.mark.full),
    pytest.param("webp", "Alpha", marks=pytest.mark.full),
    pytest.param("avif", "Alpha", marks=pytest.mark.full),
)


def alpha(image):
    return image.getchannel("A").tobytes()


@pytest.fixture
def expected(forge):
    """The picture of the same job, not saved, with the default settings."""
    return forge.picture(layerdiffuse(SD15_ATTENTION))


@pytest.mark.parametrize(("samples_format", "stealth"), SETTINGS)
def test_the_file_holds_the_transparency(forge, expected, samples_format, stealth):
    before = forge.saved_files()
    with forge.options(samples_format=samples_format, stealth_pnginfo_option=stealth):
        answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), save_images=True)
    files = sorted(forge.saved_files() - before)
    opaque = [path for path in files if path.stem.endswith("-opaque")]
    transparent = [path for path in files if path not in opaque]

    assert [path.suffix for path in transparent] == [".png"], files
    picture = Image.open(transparent[0])
    assert picture.format == "PNG" and alpha_varies(picture)
    assert alpha(picture) == alpha(expected)
    assert "LayerDiffuse" in picture.text["parameters"]

    assert [path.name for path in opaque] == [f"{transparent[0].stem}-opaque.{samples_format}"], files
    assert Image.open(opaque[0]).convert("RGBA").getchannel("A").getextrema()[0] >= 254

    assert answer.status == 200, answer.body
    assert all(data.startswith(PNG_SIGNATURE) for data in answer.files)
    assert alpha(answer.images[0]) == alpha(picture)


def test_a_plain_picture_is_saved_as_the_settings_say(forge):
    before = forge.saved_files()
    with forge.options(samples_format="jpg"):
        forge.picture(save_images=True)
    files = forge.saved_files() - before
    assert [path.suffix for path in files] == [".jpg"]


def test_all_that_goes_beside_a_picture(forge, expected):
    """With the stealth infotext on, as it is by default: it cannot write into a mask."""
    before = forge.saved_files()
    with forge.options(layerdiffuse_extras=["preview", "mask", "opaque"]):
        answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), save_images=True)
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGBA", "RGB", "L", "RGB"]
    assert answer.images[2].tobytes() == alpha(expected)
    files = {path.stem.rpartition("-")[2]: Image.open(path) for path in forge.saved_files() - before}
    assert files.keys() > {"opaque", "mask", "preview"} and len(files) == 4
    assert files["mask"].mode == "L" and files["mask"].tobytes() == alpha(expected)


def test_nothing_else_is_saved_where_nothing_else_is_wanted(forge):
    before = forge.saved_files()
    with forge.options(layerdiffuse_extras=[], layerdiffuse_passes=8):
        answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), save_images=True)
    assert [image.mode for image in answer.images] == ["RGBA"]
    assert len(forge.saved_files() - before) == 1
    assert "LayerDiffuse passes: 8" in answer.infotexts[0]


@pytest.mark.parametrize("method", [SD15_ATTENTION, SD15_JOINT])
def test_near_the_longest_path_every_picture_has_a_file_of_its_own(forge, method):
    """Forge cuts the whole path to what a file system takes of a name, and what ended the names is cut off first."""
    samples = forge.outputs / "txt2img-images"
    folder = samples / ("x" * (190 - len(str(samples))))
    shutil.rmtree(folder, ignore_errors=True)
    deep = {"save_to_dirs": True, "directories_filename_pattern": folder.name}
    with forge.options(**deep, samples_filename_pattern="[seed]-[prompt]"):
        answer = forge.txt2img(layerdiffuse(method), save_images=True, prompt="a glass bottle of perfume, " * 5)
    assert answer.status == 200, answer.body
    files = {path.stem: Image.open(path) for path in folder.iterdir()}
    assert len(files) == len(answer.images)
    ends = {"-fg", "-bg", "-blend", "-fg-opaque"} if method == SD15_JOINT else {"-opaque", ""}
    assert all(any(stem.endswith(end) for stem in files) for end in ends), files
    [transparent] = [image for image in files.values() if alpha_varies(image)]
    assert alpha(transparent) == alpha(answer.images[0])
    assert max(len(str(folder / stem)) for stem in files) > 240  # else nothing was cut


def test_the_small_jpg_of_a_large_picture_shows_the_opaque_one(forge):
    with forge.options(target_side_length=100):
        before = forge.saved_files()
        answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), save_images=True)
    [small] = [path for path in forge.saved_files() - before if path.suffix == ".jpg" and "-opaque" not in path.stem]
    opaque = answer.images[1].resize((100, 100), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    opaque.save(buffer, "JPEG", quality=80)
    assert mean_difference(Image.open(small), Image.open(buffer)) < 1
    assert mean_difference(Image.open(small), answer.images[0].convert("RGB").resize((100, 100))) > 10


def mean_difference(first, second):
    return mean(ImageStat.Stat(ImageChops.difference(first, second)).mean)
