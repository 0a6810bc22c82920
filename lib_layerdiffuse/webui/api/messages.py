"""What the HTTP routes take and answer; the descriptions stand in the server's documentation."""

from typing import Literal

from pydantic import BaseModel, Field

from lib_layerdiffuse.methods import Family, Layer
from lib_layerdiffuse.weights.downloads import State

MAX_PIXELS = 4096 * 4096  # of each picture, sent or made
MAX_LAYERS = 32  # of one composition


class Body(BaseModel, extra="forbid"):
    """What a client sends: names that are none of its fields are refused."""


class DecodeBody(Body):
    """A picture and the latent that it was decoded from."""

    image: str = Field(description="The VAE's picture: a PNG, JPG or WebP file in base64, or a data URL.")
    latent: str = Field(
        description="A safetensors file in base64 with one tensor [4, H/8, W/8] or [1, 4, H/8, W/8]: the latent in VAE "
        "space. A sampler's latent is scaled: of diffusers, send `latents / vae.config.scaling_factor`."
    )
    family: Family = Field(description="Of the model that made them.")
    passes: Literal[1, 2, 4, 8] = Field(8, description="More of them take more time and make cleaner edges.")


class EncodeBody(Body):
    """A picture with transparency."""

    image: str = Field(description="A PNG or WebP file in base64, or a data URL.")
    family: Family = Field(description="Of the model that will start from it.")


class Sheet(Body):
    """One layer of a composition."""

    image: str = Field(description="A PNG, JPG or WebP file in base64, or a data URL.")
    x: int = Field(0, ge=-MAX_PIXELS, le=MAX_PIXELS, description="Pixels from the left edge of the canvas.")
    y: int = Field(0, ge=-MAX_PIXELS, le=MAX_PIXELS, description="Pixels from the upper edge of the canvas.")
    opacity: float = Field(1.0, ge=0, le=1)


class ComposeBody(Body):
    """Layers, and what they lie on."""

    layers: list[Sheet] = Field(description="The lowest first.")
    width: int | None = Field(None, ge=1, le=MAX_PIXELS, description="Of the canvas; without it, of the first layer.")
    height: int | None = Field(None, ge=1, le=MAX_PIXELS, description="As `width`.")
    background: str = Field("transparent", description="`transparent`, `checkerboard`, or a colour such as `#20a0ff`.")


class PictureAnswer(BaseModel):
    """A picture."""

    image: str = Field(description="A PNG file in base64.")


class LatentAnswer(BaseModel):
    """What a picture's transparency adds to its latent."""

    latent: str = Field(description="A safetensors file in base64 with one tensor `latent`, [1, 4, H/8, W/8].")


class FileAnswer(BaseModel):
    """A weight file, and whether it is here."""

    file: str
    state: State


class MethodAnswer(BaseModel):
    """One way of working."""

    title: str = Field(description="As the panel shows it, where methods of other families are shown too.")
    label: str = Field(description="As infotexts have it.")
    key: str = Field(description="Names the method in script args, as title, label and number do.")
    number: int
    family: Family = Field(description="The kind of checkpoint that it needs.")
    inputs: list[Layer] = Field(description="The images that it takes.")
    outputs: list[Layer] = Field(description="What each of the pictures that belong together shows.")
    files: list[FileAnswer] = Field(description="The weights that it needs in txt2img.")
    fits_checkpoint: bool | None = Field(description="Whether the chosen checkpoint is of that kind; null: unknown.")


class WeightAnswer(BaseModel):
    """A weight file at this moment."""

    file: str
    state: State
    received: int = Field(description="Bytes that are here; a download that broke off goes on from there.")
    total: int = Field(description="Bytes expected: about, until the download began.")
    megabytes: int
    address: str = Field(description="Where it comes from.")
    error: str = Field(description="Why the download failed, or empty.")
    note: str = Field(description="Why nothing comes at the moment, or empty.")


class CheckpointAnswer(BaseModel):
    """The checkpoint that the next job samples with."""

    name: str
    family: Family | None = Field(description="Null where its file does not tell.")


class HealthAnswer(BaseModel):
    """What is installed, and what it is doing."""

    status: Literal["ok"]
    version: str = Field(description="Of the extension.")
    host: str
    checkpoint: CheckpointAnswer | None
    busy: bool = Field(description="Whether the GPU is at work.")
    weights: dict[str, int] = Field(description="How many weight files are in which state.")


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str
