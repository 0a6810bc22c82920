"""What a person should know about a request that can run, and about what came out of it: shown with the result."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from lib_layerdiffuse.images.rgba import alpha_range
from lib_layerdiffuse.methods import Layer
from lib_layerdiffuse.request.layers import Request

ALPHA_NOTES = {  # by the lowest and the highest alpha of a foreground
    (255, 255): "The foreground image has no transparency: it covers the whole picture.",
    (0, 0): "The foreground image is fully transparent: there is nothing of it to be seen.",
}
# Of a picture that came out: where hardly a pixel is on one side of this alpha, it is all on the other.
NEARLY_OPAQUE, NEARLY_EMPTY = 230, 25
HARDLY_ANY = 0.01  # of the pixels
# A painted background covers more of the picture's border than a subject does that is cut off by it, or nearly all.
# The tiny world's good pictures have a mean alpha of at most 0.12 along it, those with a background 0.8 and more.
BORDER = 1 / 32  # of the shorter side
MUCH_OF_THE_BORDER, NEARLY_ALL = 0.7, 0.9
HELP = (
    "What helps: a single subject and a plain grey background in the prompt, another sampler, the conv method, or a "
    "checkpoint nearer to the base model."
)
SUBSTITUTE = "Euler a"  # what the authors of the weights advise where DPM samplers give artifacts


def notes(request: Request, width: int, height: int, sampler: str) -> Iterator[str]:
    """Sentences about the images, prompts and sampler of a request. width, height: of the first sampling pass."""
    method = request.method
    for layer in request.images:
        if layer not in method.inputs:
            yield f"{method.full_title} takes no {layer.word} image: the one given was not used."
    for layer in request.prompts:
        if layer not in method.outputs:
            yield f"{method.full_title} makes no {layer.word}: the {layer.word} prompt was not used."
    for layer in method.inputs:
        [image] = request.images[layer]
        if image.size != (width, height):
            yield (
                f"The {layer.word} image of {image.width}x{image.height} was brought to {width}x{height} "
                f"({request.resize_mode.value})."
            )
        if layer is Layer.FG and (sentence := ALPHA_NOTES.get(alpha_range(image))):
            yield sentence
    for step in method.steps:
        if sampler_for(step.avoids, sampler) != sampler:
            yield f"{sampler} gives artifacts in the step {step.key}, which was sampled with {SUBSTITUTE}."


def alpha_note(picture: Image.Image) -> str | None:
    """A sentence about an RGBA picture that has hardly anything transparent, or hardly anything else."""
    alpha = np.asarray(picture.getchannel("A"))
    opaque, border = (alpha >= NEARLY_OPAQUE).mean(), along_border(alpha).mean() / 255
    if opaque > 1 - HARDLY_ANY:
        return f"The picture came out opaque: hardly any of it is transparent. {HELP}"
    if (alpha >= NEARLY_EMPTY).mean() < HARDLY_ANY:
        return f"The picture came out empty: nearly all of it is transparent. {HELP}"
    if border > MUCH_OF_THE_BORDER or opaque > NEARLY_ALL:
        return (
            f"The picture came out with a background: {opaque:.0%} of it is opaque, and its border to {border:.0%}. "
            f"{HELP}"
        )
    return None


def along_border(alpha: np.ndarray) -> np.ndarray:
    """The values [H, W] of the outermost pixels, as many as matter."""
    width = max(1, round(BORDER * min(alpha.shape)))
    outer = np.ones(alpha.shape, bool)
    outer[width:-width, width:-width] = False
    return alpha[outer]


def sampler_for(avoids: str, sampler: str) -> str:
    """The sampler of a step that avoids all whose name contains `avoids`."""
    return SUBSTITUTE if avoids and avoids in sampler else sampler
