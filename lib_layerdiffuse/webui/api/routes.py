"""The extension's own HTTP routes, on the web UI's server; the docstrings of `Routes` are their documentation there."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from PIL import Image, ImageColor
from safetensors.torch import load, save
from starlette.routing import Match

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.encoding import decoded, encoded
from lib_layerdiffuse.images.reading import TooLarge, read_image
from lib_layerdiffuse.images.rgba import checkerboard, from_pil, over_grey, to_pil
from lib_layerdiffuse.images.samples import Unclear
from lib_layerdiffuse.methods import METHODS, Family, Method, listed, nearest, needed_files, shortened
from lib_layerdiffuse.request.form import IMAGE_NEEDS
from lib_layerdiffuse.tensors import Latent
from lib_layerdiffuse.vae import LATENT_STRIDE
from lib_layerdiffuse.version import own_version
from lib_layerdiffuse.webui.api.guards import AnswerInPieces, BasicAuth, Client, route_class
from lib_layerdiffuse.webui.api.messages import (
    MAX_LAYERS,
    MAX_PIXELS,
    CheckpointAnswer,
    ComposeBody,
    DecodeBody,
    EncodeBody,
    FileAnswer,
    HealthAnswer,
    LatentAnswer,
    MethodAnswer,
    PictureAnswer,
    Refusal,
    Sheet,
    WeightAnswer,
)
from lib_layerdiffuse.webui.api.networks import Networks
from lib_layerdiffuse.webui.extension import Extension
from lib_layerdiffuse.weights.downloads import Status, find_asset
from lib_layerdiffuse.weights.released import ASSETS, address_of

PREFIX = "/layerdiffuse/v1"
TITLE = "LayerDiffuse"

LATENT_NEEDS = "a safetensors file with one tensor, in base64"

# --- the routes


class Routes:
    """What is done for each route. Those that need no GPU and no time also answer while many jobs wait."""

    def __init__(self, extension: Extension) -> None:
        self.extension = extension
        self.networks = Networks(extension)
        self.version = own_version()

    async def health(self) -> HealthAnswer:
        """What is installed, and whether it is at work. Answers at once, also while jobs wait."""
        host = self.extension.host
        return HealthAnswer(
            status="ok",
            version=self.version,
            host=host.name(),
            checkpoint=self._checkpoint(),
            busy=host.busy(),
            weights=Counter(self.extension.downloads.status(file).state.value for file in ASSETS),
        )

    def _checkpoint(self) -> CheckpointAnswer | None:
        file = self.extension.host.checkpoint_file(None)
        return CheckpointAnswer(name=file.stem, family=self.extension.chosen_family()) if file else None

    async def list_methods(self) -> list[MethodAnswer]:
        """The methods, in the order of the panel; how to use one in a job, docs/api.md says."""
        family = self.extension.chosen_family()
        return [self._method(number, method, family) for number, method in enumerate(METHODS)]

    def _method(self, number: int, method: Method, family: Family | None) -> MethodAnswer:
        status = self.extension.downloads.status
        return MethodAnswer(
            title=method.full_title,
            label=method.label,
            key=method.key,
            number=number,
            family=method.family,
            inputs=list(method.inputs),
            outputs=list(method.outputs),
            files=[FileAnswer(file=file, state=status(file).state) for file in needed_files(method)],
            fits_checkpoint=None if family is None else family is method.family,
        )

    async def list_weights(self) -> list[WeightAnswer]:
        """All weight files, and which of them are here."""
        return [weight_answer(self.extension.downloads.status(file)) for file in ASSETS]

    async def weight_status(self, file: str) -> WeightAnswer:
        """One weight file: ask again while it is downloaded, to follow that."""
        return weight_answer(self.extension.downloads.status(known(file)))

    async def start_download(self, file: str) -> WeightAnswer:
        """Start to download a weight file. Nothing happens where it is here or on its way; a job would wait for it."""
        return weight_answer(self.extension.downloads.start(known(file)))

    async def cancel_download(self, file: str) -> WeightAnswer:
        """End the download of a weight file, also one that a job waits for. What has come is kept for the next time."""
        return weight_answer(self.extension.downloads.cancel(known(file)))

    def decode(self, body: DecodeBody, client: Client) -> PictureAnswer:
        """Give a picture its transparency, from the latent that it was decoded from.

        Width and height are multiples of 8. Waits for the jobs before it; missing weights are downloaded first.
        """
        image = picture("image", body.image)
        check_cells("image", image)
        latent = read_latent(body.latent, image, Family(body.family))
        rgba = self.networks.decode(body.family, over_grey(image), latent, body.passes, client.go_on)
        return PictureAnswer(image=png(to_pil(rgba[0])))

    def encode(self, body: EncodeBody, client: Client) -> LatentAnswer:
        """What a picture's transparency adds to its latent, to start img2img from.

        Encode the picture over the middle grey (0.5) with the model's own VAE, and take the mean and the std of its
        posterior: `mean + std * latent` is the start, in VAE space (unscaled; for diffusers, times
        `vae.config.scaling_factor`). Width and height are multiples of 8.
        """
        image = picture("image", body.image).convert("RGBA")
        check_cells("image", image)
        offset = self.networks.encode(body.family, from_pil(image)[None], client.go_on)
        return LatentAnswer(latent=encoded(save({"latent": offset.cpu().contiguous()})))

    def compose(self, body: ComposeBody, client: Client) -> PictureAnswer:
        """Put layers over one another, the lowest first, each where and as opaque as it says."""
        if not 0 < len(body.layers) <= MAX_LAYERS:
            raise HTTPException(413, f"layers has {len(body.layers)} of them. Send 1 to {MAX_LAYERS}.")
        first = picture("layers[0].image", body.layers[0].image)
        canvas = ground(body.background, body.width or first.width, body.height or first.height)
        for number, layer in enumerate(body.layers):
            client.go_on()
            image = picture(f"layers[{number}].image", layer.image) if number else first
            canvas = Image.alpha_composite(canvas, placed(image.convert("RGBA"), layer, canvas.size))
        return PictureAnswer(image=png(canvas))


def known(file: str) -> str:
    """The name, of one of our files."""
    try:
        return find_asset(file).file
    except LayerDiffuseError as error:
        raise HTTPException(404, str(error)) from error


def weight_answer(status: Status) -> WeightAnswer:
    asset = status.asset
    return WeightAnswer(
        file=asset.file,
        state=status.state,
        received=status.received,
        total=status.total,
        megabytes=asset.megabytes,
        address=address_of(asset.file),
        error=status.error,
        note=status.note,
    )


# --- pictures and latents


def picture(name: str, data: str) -> Image.Image:
    """The image in a field of that name. One that is too large is refused before its pixels are decoded."""
    try:
        with needing(name, IMAGE_NEEDS):
            return read_image(data, MAX_PIXELS)
    except TooLarge as error:
        raise too_large(name) from error


def read_latent(data: str, image: Image.Image, family: Family) -> Latent:
    """The one tensor in the file, as the latent [1, C, H/8, W/8] of the image."""
    with needing("latent", LATENT_NEEDS):
        [tensor] = load(decoded(data)).values()
        latent = tensor.float()
    expected = (family.channels, image.height // LATENT_STRIDE, image.width // LATENT_STRIDE)
    if tuple(latent.shape) not in (expected, (1, *expected)):
        raise LayerDiffuseError(
            f"latent has the shape {list(latent.shape)}, but that of an image of {image.width}x{image.height} is "
            f"{list(expected)}. Send the latent that the image was decoded from."
        )
    if not latent.isfinite().all():
        raise LayerDiffuseError("latent has values that are no numbers, or are infinite. Send one without.")
    return latent.view(1, *expected)


@contextmanager
def needing(name: str, needs: str) -> Iterator[None]:
    """Damaged files raise whatever they like: say what the field needs."""
    try:
        yield
    except TooLarge:
        raise
    except Unclear as error:
        raise LayerDiffuseError(f"{name} {error}") from error
    except Exception as error:
        raise LayerDiffuseError(f"{name} cannot be read. Set it to {needs}.") from error


def check_cells(name: str, image: Image.Image) -> None:
    if image.width % LATENT_STRIDE or image.height % LATENT_STRIDE:
        raise LayerDiffuseError(
            f"{name} has {image.width}x{image.height} pixels. Send a width and height that {LATENT_STRIDE} divides."
        )


def too_large(name: str) -> HTTPException:
    return HTTPException(413, f"{name} has more than {MAX_PIXELS:,} pixels, which is the limit. Choose a smaller size.")


def ground(background: str, width: int, height: int) -> Image.Image:
    """What layers lie on: RGBA."""
    if width * height > MAX_PIXELS:
        raise too_large("The canvas")
    if background == "checkerboard":
        return to_pil(checkerboard(height, width)[0]).convert("RGBA")
    if background == "transparent":
        return Image.new("RGBA", (width, height))
    if not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise LayerDiffuseError(
            f'background is {shortened(background)}. Set it to "transparent", "checkerboard" or a colour such as '
            '"#20a0ff".'
        )
    return Image.new("RGBA", (width, height), ImageColor.getrgb(background))


def placed(image: Image.Image, layer: Sheet, size: tuple[int, int]) -> Image.Image:
    """The RGBA image on a transparent sheet of the canvas' size, faded to its opacity."""
    image.putalpha(image.getchannel("A").point([round(value * layer.opacity) for value in range(256)]))
    sheet = Image.new("RGBA", size)
    sheet.paste(image, (layer.x, layer.y))
    return sheet


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return encoded(file.getvalue())


# --- registration


def register(app: FastAPI, extension: Extension) -> None:
    """Add the routes to the web UI's server, where it serves an API at all."""
    users = extension.host.api_users()
    if users is not None:
        app.include_router(router_for(extension, users))
        app.openapi_schema = None  # made again: somebody may have asked for it already


def router_for(extension: Extension, users: Sequence[str]) -> APIRouter:
    """users: who may use the routes, each `name:password`; empty: everybody."""
    guards = [BasicAuth(users)] if users else []
    router = APIRouter(
        prefix=PREFIX,
        tags=[TITLE],
        route_class=route_class(guards),
        default_response_class=AnswerInPieces,
        dependencies=[Depends(guard) for guard in guards],
    )
    routes = Routes(extension)
    example = Examples()
    for method, path, endpoint, status, answer, request in (
        ("GET", "/health", routes.health, 200, example.health, None),
        ("GET", "/methods", routes.list_methods, 200, example.methods, None),
        ("GET", "/weights", routes.list_weights, 200, [example.weight], None),
        ("GET", "/weights/{file}", routes.weight_status, 200, example.weight, None),
        ("POST", "/weights/{file}/download", routes.start_download, 202, example.weight, None),
        ("DELETE", "/weights/{file}/download", routes.cancel_download, 200, example.weight, None),
        ("POST", "/decode", routes.decode, 200, example.picture, example.decode),
        ("POST", "/encode", routes.encode, 200, example.latent, example.encode),
        ("POST", "/compose", routes.compose, 200, example.picture, example.compose),
    ):
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            status_code=status,
            responses={
                status: {"content": {"application/json": {"example": answer}}},
                "4XX": {"model": Refusal, "description": "Refused: `detail` says what is wrong, in a sentence."},
            },
            openapi_extra=request and {"requestBody": {"content": {"application/json": {"example": request}}}},
        )
    add_rest(router)
    return router


def add_rest(router: APIRouter) -> None:
    """Everything else under the prefix is answered with a sentence too."""

    async def nothing(request: Request) -> None:
        allowed = [
            method
            for route in router.routes
            if route.matches(request.scope)[0] is Match.PARTIAL  # the path, but not the method
            for method in route.methods
        ]
        if allowed:
            raise HTTPException(
                405,
                f"{request.method} is not possible here. Use {' or '.join(allowed)}.",
                {"Allow": ", ".join(allowed)},
            )
        near = nearest(request.url.path, {route.path for route in router.routes if route.include_in_schema})
        raise HTTPException(404, f"There is nothing at {shortened(request.url.path)}. Did you mean {listed(near)}?")

    # No methods are all of them; then FastAPI can make no id of one.
    router.add_api_route("/{rest:path}", nothing, methods=[], operation_id="nothing", include_in_schema=False)


class Examples:
    """Requests that can be sent as they are, and answers, for the documentation."""

    def __init__(self) -> None:
        file = "vae_transparent_encoder.safetensors"
        image = png(Image.new("RGBA", (8, 8), (32, 160, 255, 128)))
        latent = encoded(save({"latent": torch.zeros(1, Family.SDXL.channels, 1, 1)}))
        self.picture = {"image": image}
        self.latent = {"latent": latent}
        self.decode = {"image": image, "latent": latent, "family": "sdxl", "passes": 8}
        self.encode = {"image": image, "family": "sdxl"}
        self.compose = {"layers": [{"image": image}, {"image": image, "x": 4, "y": 4, "opacity": 0.5}], "width": 16}
        self.weight = {
            "file": file,
            "state": "downloading",
            "received": 1_000_000,
            "total": 2_400_000,
            "megabytes": 2,
            "address": address_of(file),
            "error": "",
            "note": "",
        }
        self.methods = [
            {
                "title": "Blend for a foreground (SDXL)",
                "label": "(SDXL) From Foreground to Blending",
                "key": "xl_fg2ble",
                "number": 6,
                "family": "sdxl",
                "inputs": ["fg"],
                "outputs": ["blend"],
                "files": [{"file": "layer_xl_fg2ble.safetensors", "state": "present"}],
                "fits_checkpoint": True,
            }
        ]
        self.health = {
            "status": "ok",
            "version": own_version(),
            "host": "Stable Diffusion WebUI Forge 2.0.1v1.10.1",
            "checkpoint": {"name": "sd_xl_base_1.0", "family": "sdxl"},
            "busy": False,
            "weights": {"present": 3, "missing": 11},
        }
