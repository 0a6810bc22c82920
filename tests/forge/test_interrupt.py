"""Interrupt ends the job soon, with what there is so far as a transparent picture."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.forge.client import SD15_ATTENTION, alpha_varies, layerdiffuse, same
from tests.forge.hosts import HOST, LACKS

STEPS = 60  # minutes, if nothing ended it
LIMIT_S = 60
SHOWS_LATENTS = "pictures of interrupted jobs" in LACKS[HOST]


def wait_for(condition, limit=LIMIT_S):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {limit} s"
        time.sleep(0.2)


def sampling_step(forge):
    return forge.request("sdapi/v1/progress?skip_current_image=true").body["state"]["sampling_step"]


def test_interrupt_while_sampling(forge):
    before = forge.picture(layerdiffuse(SD15_ATTENTION))
    with ThreadPoolExecutor() as pool:
        job = pool.submit(forge.txt2img, layerdiffuse(SD15_ATTENTION), steps=STEPS)
        wait_for(lambda: sampling_step(forge) >= 1)
        forge.request("sdapi/v1/interrupt", {})
        answer = job.result(LIMIT_S)
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0]) or SHOWS_LATENTS
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION)), before)
