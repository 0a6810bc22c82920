"""Repaints the middle of every picture in a job of its own, as ADetailer does: in the same hook, with the same mark.

And as that does, it has all scripts end the job before it begins, and begin it once more at its end.
"""

import os
from copy import copy

import gradio as gr
from modules import scripts
from modules.processing import Processed, StableDiffusionProcessingImg2Img, process_images
from PIL import Image


def middle(size):
    """A mask: white in the middle quarter."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4))
    return mask


class Detailer(scripts.Script):
    def title(self):
        return "LayerDiffuse test detailer"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if "LAYERDIFFUSE_PROBE" in os.environ else False

    def ui(self, is_img2img):
        return [gr.Checkbox(False, visible=False)]

    def postprocess_image(self, p, pp, enabled):
        if not enabled or getattr(p, "_ad_inner", False):
            return
        inner = StableDiffusionProcessingImg2Img(
            init_images=[pp.image],
            mask=middle(pp.image.size),
            mask_blur=0,
            inpainting_fill=1,
            inpaint_full_res=True,
            denoising_strength=0.9,
            prompt=p.prompt,
            seed=p.seed + 1,
            steps=2,
            width=p.width,
            height=p.height,
            sampler_name="Euler",
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        if p.batch_index == 0:
            p.scripts.postprocess(copy(p), Processed(p, [], p.seed, ""))
        inner.scripts, inner.script_args = p.scripts, p.script_args
        inner._ad_inner = True
        pp.image = process_images(inner).images[0]
        if p.batch_index == p.batch_size - 1:
            p.scripts.process(copy(p))
