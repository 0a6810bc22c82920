"""Writes to the log how much an inpainting checkpoint is told to be masked, at each call of the UNet."""

import os

import gradio as gr
from modules import scripts


def watched(apply_model, arguments):
    mask = arguments["c"]["c_concat"][:, 0]
    print(f"masked: {mask.mean().item():.3f}")
    return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])


class Inpainting(scripts.Script):
    def title(self):
        return "LayerDiffuse test inpainting"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if "LAYERDIFFUSE_PROBE" in os.environ else False

    def ui(self, is_img2img):
        return [gr.Checkbox(False, visible=False)]

    def process_before_every_sampling(self, p, enabled, **kwargs):
        if enabled:
            p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()
            p.sd_model.forge_objects.unet.set_model_unet_function_wrapper(watched)
