"""What the extension asks of a web UI. `p` is the host's own object for one job (`StableDiffusionProcessing`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL import Image
from torch import Tensor

from lib_layerdiffuse.engine.backend import Backend
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import REFUSALS, read_image
from lib_layerdiffuse.images.rgba import Box, ResizeMode, fit
from lib_layerdiffuse.request.form import IMAGE_NEEDS
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.tensors import Latent
from lib_layerdiffuse.vae import LATENT_STRIDE
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.script_runs import ScriptRun

Around: TypeAlias = Callable[[Latent, Latent], AbstractContextManager[None]]


class Host(Protocol):
    """One web UI. Every host imports its web UI in its own file only."""

    @property
    def backend(self) -> Backend:
        """The checkpoint that is loaded in it."""

    @property
    def edits_follow(self) -> bool:
        """Whether scripts edit a picture after the hook in which they get it composited."""

    def finish_after_edits(self, finish: Callable[[Job, Any], None]) -> None:
        """Where they do: have `finish(p, pp)` called with each picture when they are done with it."""

    def name(self) -> str:
        """What the web UI is called, and its version."""

    def api_users(self) -> Sequence[str] | None:
        """Who may use the API, each as `name:password`; empty: everybody. None where the web UI serves no API."""

    def queue(self) -> AbstractContextManager[None]:
        """While open, no job runs; opening it waits for those that came before."""

    def busy(self) -> bool:
        """Whether a job runs, or anything else that has the queue."""

    def weight_folders(self) -> list[Path]:
        """Where weight files are looked for; the first is where they are downloaded to."""

    def option(self, key: str) -> Any:
        """A value of the host's settings page."""

    def progress(self) -> AbstractContextManager[Callable[[str, float], None]]:
        """While open, the yielded `report(text, fraction)` shows both on the host's progress bar."""

    def interrupted(self) -> bool:
        """Whether the user wants this picture to end now."""

    def stopping(self) -> bool:
        """Whether the user wants the job to end, now or after this picture."""

    def read_args(self, readers: Mapping[str, Callable[[object], list[object]]]) -> None:
        """Have the API take the args of the scripts with these titles as their readers read them."""

    def fail(self, p: Job, error: Exception, processed: Processed | None = None) -> None:
        """Make the job end with `error` at its next step: hosts swallow what a hook raises.

        processed: what the job made, where its last step is over.
        """

    def note(self, p: Job, text: str) -> None:
        """Show a sentence with the result."""

    def script_run(self, p: Job) -> ScriptRun:
        """The run of a script that this job belongs to; one of its own where there is none."""

    def size(self, p: Job) -> tuple[int, int]:
        """Width and height of the first sampling pass."""

    def refiner(self, p: Job) -> str | None:
        """The checkpoint that takes over on the way, and when, in words."""

    def expect(self, p: Job, times: int) -> None:
        """Have the progress bar count on this job being run so many times, before the first."""

    def fit_batch(self, p: Job, frames: int) -> None:
        """Round the batch size up to whole pictures; see `batches.fitted`."""

    def rows(self, p: Job) -> range:
        """Which pictures of the job this batch is."""

    def put_before_prompts(self, p: Job, texts: Sequence[str]) -> None:
        """Sample this batch with `texts`, one for each frame, before the prompts; what is recorded stays."""

    def restore_prompts(self, p: Job) -> None:
        """After the host has read the prompts of this batch."""

    def run_again(self, p: Job, request: Request, sampler: str) -> Any:
        """Run a copy of the job, with the same prompts and seeds, for another request; what it made (`processed`)."""

    def sampler(self, p: Job) -> str:
        """The name of the job's sampler."""

    def add_runs(self, p: Job, processed: Processed, runs: Sequence[Any]) -> None:
        """Put the pictures of later runs behind those of the first that they belong to."""

    def checkpoint_file(self, title: str | None) -> Path | None:
        """The file of the checkpoint with that title in the page's list; of the chosen one for None."""

    def is_checkpoint_box(self, component: Any) -> bool:
        """Whether this is the page's list of checkpoints to choose from."""

    def init_images(self, p: Job) -> list[Image.Image]:
        """The pictures that img2img starts from; empty in txt2img."""

    def set_init_images(self, p: Job, init_images: list[Image.Image]) -> None:
        """Have img2img start from these instead."""

    def flat_init(self, p: Job, index: int) -> Image.Image:
        """The picture that the one at `index` of a batch starts from, as the host takes it: opaque."""

    def init_mode(self, p: Job) -> ResizeMode | None:
        """How they are brought to the size of the picture; None where that happens to their latents."""

    def start_from(self, p: Job, latents: Latent) -> None:
        """Have img2img start from these (sampler space, one for each picture of the batch) instead of its own.

        Masked parts are filled as the job says, where that is done to latents.
        """

    def fills_mask(self, p: Job) -> bool:
        """Whether what is masked starts from its surroundings instead of from what is there."""

    def latent_mask(self, p: Job) -> Image.Image | None:
        """The mask as it is sampled, cell by cell: for hosts that have no hook to say it pixel by pixel."""

    def mask(self, p: Job) -> Image.Image | None:
        """The inpaint mask: mode L, 255 where the picture is painted over, not blurred yet."""

    def flatten_mask(self, p: Job) -> None:
        """Have the job inpaint with its mask as `mask` reads it: hosts may take the alpha of it for all of it."""

    def set_mask(self, p: Job, mask: Image.Image) -> None:
        """Have the job inpaint with this mask (mode L) as it is, soft edges and all.

        Where it had no mask, the whole picture is sampled, from what is there.
        """

    def restore_mask(self, p: Job) -> None:
        """After the job: put back the mask that it had."""

    def only_masked(self, p: Job) -> bool:
        """Whether only the masked part of the picture is sampled, enlarged to the size of the job."""

    def region(self, p: Job) -> Box | None:
        """That part of the init image, once sampling begins: left, upper, right and lower edge. None: all of it."""

    def steps(self, p: Job) -> int:
        """How many steps img2img will sample."""

    def overlaid(self, p: Job, picture: Image.Image, overlay: Image.Image | None) -> Image.Image:
        """What the host makes of a sampled picture: put in its place, with what was not painted over it."""

    def pictures(self, processed: Processed) -> list[Image.Image]:
        """What the job made, without a grid of them, and without masks."""

    def save_extra(self, p: Job, processed: Processed, index: int, picture: Image.Image, name: str) -> None:
        """Show a picture behind the others, and save it beside the one at `index`, if that is saved."""

    def flatten_upscaled(self, p: Job, flatten: Callable[[Image.Image], Image.Image]) -> None:
        """The upscale button under the gallery starts from a finished picture, which hosts take for RGB."""

    def upscales(self, p: Job) -> bool:
        """Whether this is the upscale button: a hires pass that starts from one finished picture."""

    def around_sampling(self, p: Job, owner: str, around: Around, finished: Callable[[Latent], None]) -> None:
        """Run the next samplings inside `around(x, noise)`, and hand their final latents to `finished`.

        Instead of what the owner gave before. x: what img2img starts from, without the noise; in txt2img, both are the
        noise. All are in sampler space.
        """

    def hold(
        self, p: Job, original: Latent, noise: Latent, released: Callable[[Sequence[float], float], Tensor]
    ) -> AbstractContextManager[None]:
        """`Backend.hold`, instead of the web UI's own inpainting. released: of the sampler's sigmas, and of one."""

    def infotexts(self, processed: Processed) -> list[str]:
        """Of each of `pictures`."""

    def show(self, p: Job, processed: Processed, extras: Sequence[Image.Image], frames: int) -> None:
        """Put the extras behind what the job made (`processed`), and the notes where API clients see them too.

        For the API, the pictures precede the grid. frames: how many of the pictures belong together, each time.
        """

    def is_saved_again(self, p: Any) -> bool:
        """Whether what is saved for `p` is a picture of the page's gallery, and no grid."""

    def path_fits(self, path: Path) -> bool:
        """Whether the host and the file system take a path as it is."""

    def save_beside(self, p: Job, image: Image.Image, path: Path, suffix: str, extension: str, infotext: str) -> None:
        """Save `image` in `path`'s folder, under its name with `suffix`."""


def seen(host: Host, p: Job, image: Image.Image) -> Image.Image:
    """What of an init image, or of a mask of its size, is sampled: at that size, unless its latents are enlarged."""
    width, height = host.size(p)
    mode = host.init_mode(p)
    if region := host.region(p):
        image = fit(image.crop(region), ResizeMode.RESIZE_AND_FILL, width, height)
    elif mode:
        image = fit(image, mode, width, height)
    return whole_cells(image)


def whole_cells(image: Image.Image) -> Image.Image:
    """The image without the last pixels that do not fill a cell of its latent, as VAEs leave them out."""
    width, height = (max(1, side // LATENT_STRIDE) * LATENT_STRIDE for side in image.size)
    return image.crop((0, 0, width, height))


def init_picture(init: Image.Image) -> Image.Image:
    """A picture that img2img starts from, as RGBA. Hosts open files without reading them to their end."""
    try:
        return read_image(init).convert("RGBA")
    except REFUSALS as error:
        raise LayerDiffuseError(f"The picture that img2img starts from {error}") from error
    except ValueError as error:
        raise LayerDiffuseError(f"The picture that img2img starts from is damaged. Set it to {IMAGE_NEEDS}.") from error


def check_mask(host: Host, p: Job) -> None:
    """Raises LayerDiffuseError where a masked picture would be enlarged as latents: a mask is for pixels."""
    if host.mask(p) and host.init_mode(p) is None:
        raise LayerDiffuseError(
            "A mask or change map belongs to the pixels of the picture, but this resize mode enlarges its latents. "
            'Choose another, such as "Just resize".'
        )
