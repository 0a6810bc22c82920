"""Img2img that samples nothing: its latents come out as they went in. Before LayerDiffuse, which wraps it."""

import os

import gradio as gr
from modules import scripts


class Standstill(scripts.Script):
    def title(self):
        return "LayerDiffuse test standstill"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if is_img2img and "LAYERDIFFUSE_PROBE" in os.environ else False

    def ui(self, is_img2img):
        return [gr.Checkbox(False, visible=False)]

    def process_before_every_sampling(self, p, enabled, **kwargs):
        def sample_img2img(p, x, noise, *args, **kwargs):
            return x

        if enabled and not hasattr(p.sampler, "layerdiffuse_owners"):
            p.sampler.sample_img2img = sample_img2img
