"""Writes down each step of sampling: how long it takes or, where a request asks for it, how many operations it is.

One JSON line for each step, appended to the file that the environment variable LAYERDIFFUSE_STEPS names. A job ends
with its sampling, unless a request asks for the pictures: what decoding takes is measured elsewhere.
"""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

import gradio as gr
import torch
from modules import script_callbacks, scripts
from torch.utils._python_dispatch import TorchDispatchMode

FILE = os.environ.get("LAYERDIFFUSE_STEPS")
SMALL = 8  # cells of a latent that is decoded in no time


def of_inner(which):
    """Of a matrix product: the inner side, which is the last of the argument at `which`."""
    return lambda out, args: 2 * out.numel() * args[which].shape[-1]


def of_convolution(out, args):
    return 2 * out.numel() * args[1][0].numel()


def of_attention(out, args):
    return 4 * args[0].numel() * args[1].shape[-2]


# By PyTorch's names, as they come in inference mode and out of it: a product and a sum are two operations.
OPERATIONS = {
    **dict.fromkeys(("mm", "bmm", "linear", "matmul", "_linear_pointwise"), of_inner(0)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm"), of_inner(1)),
    **dict.fromkeys(("conv2d", "convolution"), of_convolution),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
        ),
        of_attention,
    ),
}


class Counter(TorchDispatchMode):
    """Counts the operations of products while it is active; the rest does not count beside them."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if count := OPERATIONS.get(func._overloadpacket.__name__):
            self.operations += count(answer[0] if isinstance(answer, tuple) else answer, args)
        return answer


class Step:
    """The step under way."""

    def __init__(self):
        self.counts = False
        self.counter = self.started = None
        self.stack = ExitStack()

    def begin(self, params):
        if self.counts:
            self.counter = self.stack.enter_context(Counter())
        self.started = now()

    def end(self, params):
        seconds = now() - self.started
        self.stack.close()
        line = {"operations": self.counter.operations} if self.counts else {"seconds": seconds}
        if torch.cuda.is_available():
            line["device_bytes"] = torch.cuda.max_memory_allocated()
        with Path(FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


STEP = Step()
if FILE:
    script_callbacks.on_cfg_denoiser(STEP.begin)
    script_callbacks.on_cfg_after_cfg(STEP.end)


class Steps(scripts.Script):
    def title(self):
        return "LayerDiffuse steps"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if FILE else False

    def ui(self, is_img2img):
        return [gr.Checkbox(False, visible=False), gr.Checkbox(True, visible=False)]

    def process(self, p, counts, pictures):
        STEP.counts = counts

    def post_sample(self, p, ps, counts, pictures):
        if not pictures:
            ps.samples = ps.samples[..., :SMALL, :SMALL]
            p.scripts = None  # nobody decodes it
