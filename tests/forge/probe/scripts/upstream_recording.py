"""Lets the existing extension take layer images over the API, and makes what it does with them repeatable.

Works only where record_upstream.py switches it on: beside any other extension it would hide what is tested.
"""

import base64
import io
import os

import numpy as np
from modules import scripts
from PIL import Image

ON = "LAYERDIFFUSE_PROBE_RECORDING" in os.environ
PNG_IN_BASE64 = "iVBORw0KGgo"

if ON:  # in Forge alone
    from backend.nn.vae import DiagonalGaussianDistribution

    # The existing extension samples its images' VAE posterior with the global random numbers, which no seed sets.
    # The mean is what a sample is spread around, and what ours takes.
    DiagonalGaussianDistribution.sample = DiagonalGaussianDistribution.mode


def decoded(argument):
    """A PNG picture as the page's canvas hands it over: uint8 [H, W, 4]; anything else as it is."""
    if not (isinstance(argument, str) and argument.startswith(PNG_IN_BASE64)):
        return argument
    return np.array(Image.open(io.BytesIO(base64.b64decode(argument))).convert("RGBA"))


class UpstreamRecording(scripts.Script):
    def title(self):
        return "LayerDiffuse upstream recording"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if ON else False

    def before_process(self, p, *args):
        """The existing extension fails on a picture in base64, the only way that a request can carry one.

        The host reads p.script_args anew for each hook, so every later hook gets the decoded pictures.
        """
        p.script_args = tuple(decoded(argument) for argument in p.script_args)
