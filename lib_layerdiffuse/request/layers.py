"""From what the panel or an API call sends to a request the rest of the program can trust."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import ResizeMode
from lib_layerdiffuse.methods import DEFAULT_METHOD, Layer, Method, Step, find_method, listed
from lib_layerdiffuse.request.form import IMAGE_NEEDS, Form, anything, control, flag, image, number, one_of, text
from lib_layerdiffuse.vae import PASSES

AS_IN_SETTINGS = "as in Settings"
GREY_BACKGROUND = "plain grey background"  # what the models were trained to see where nothing is


def _passes(raw: object) -> int:
    """0 where the settings say."""
    return 0 if raw == AS_IN_SETTINGS else one_of(0, *PASSES)(raw)


@dataclass(frozen=True)
class LayerFields:
    """Raw values, as the panel and the API send them; the order of the fields is the order of both."""

    enabled: object = control("Enable", False, flag, "true or false")
    method: object = control(
        "Method",
        DEFAULT_METHOD.label,
        find_method,
        infotext="LayerDiffuse method",
        hint="What is made, from what. The methods for one kind of checkpoint do not work with another.",
    )
    weight: object = control(
        "Weight",
        1.0,
        number(0, 2),
        "a number from 0 to 2",
        infotext="LayerDiffuse weight",
        hint="How strongly the added weights count: 1 is as they were trained, 0 is the checkpoint alone.",
    )
    ending_step: object = control(
        "Stop At",
        1.0,
        number(0, 1),
        "a number from 0 to 1",
        infotext="LayerDiffuse stop at",
        hint="Up to which part of the steps they count: 1 is the last step.",
    )
    fg_image: object = control(
        "Foreground",
        None,
        image,
        IMAGE_NEEDS,
        hint="A picture with transparency. Upload, drop or paste it, or send a result here.",
    )
    bg_image: object = control(
        "Background",
        None,
        image,
        IMAGE_NEEDS,
        hint="The picture behind the foreground. Upload, drop or paste it, or send a result here.",
    )
    blend_image: object = control(
        "Blending",
        None,
        image,
        IMAGE_NEEDS,
        hint="The foreground in its background, as one picture. Upload, drop or paste it, or send a result here.",
    )
    resize_mode: object = control(
        "Resize Mode",
        "Crop and Resize",
        ResizeMode,
        listed(mode.value for mode in ResizeMode),
        infotext="LayerDiffuse resize mode",
        hint="How an image of another size is brought to the size of the result.",
    )
    output_origin: object = control("Output Original", False, anything, "true or false")  # of older calls; no effect
    fg_prompt: object = control(
        "Foreground Prompt",
        "",
        text,
        "text",
        infotext="LayerDiffuse foreground prompt",
        hint="Words for the foreground alone, put before the prompt.",
    )
    bg_prompt: object = control(
        "Background Prompt",
        "",
        text,
        "text",
        infotext="LayerDiffuse background prompt",
        hint="Words for the background alone, put before the prompt.",
    )
    blend_prompt: object = control(
        "Blending Prompt",
        "",
        text,
        "text",
        infotext="LayerDiffuse blend prompt",
        hint="Words for the blend alone, put before the prompt.",
    )
    starting_step: object = control(
        "Start At",
        0.0,
        number(0, 1),
        "a number from 0 to 1",
        infotext="LayerDiffuse start at",
        hint="From which part of the steps on they count: 0 is the first step.",
    )
    passes: object = control(
        "Decoder Passes",
        AS_IN_SETTINGS,
        _passes,
        f'1, 2, 4 or 8, or to 0 or "{AS_IN_SETTINGS}" for the number on the settings page',
        infotext="LayerDiffuse passes",
        hint="How often the decoder looks at the picture, turned otherwise each time: 8 give the cleanest edges, "
        "1 takes an eighth of the time.",
    )
    grey_background: object = control(
        "Grey Background",
        False,
        flag,
        "true or false",
        infotext="LayerDiffuse grey background",
        hint=f'Puts "{GREY_BACKGROUND}" before the prompt of the foreground: for checkpoints that paint a '
        "background where there should be none.",
    )


FORM = Form(
    "LayerDiffuse",
    LayerFields,
    {"start_at": "starting_step", "stop_at": "ending_step", "gray_background": "grey_background"},
    {  # as the older extension wrote them
        "layerdiffusion_method": "LayerDiffuse method",
        "layerdiffusion_weight": "LayerDiffuse weight",
        "layerdiffusion_ending_step": "LayerDiffuse stop at",
        "layerdiffusion_resize_mode": "LayerDiffuse resize mode",
        "layerdiffusion_fg_additional_prompt": "LayerDiffuse foreground prompt",
        "layerdiffusion_bg_additional_prompt": "LayerDiffuse background prompt",
        "layerdiffusion_blend_additional_prompt": "LayerDiffuse blend prompt",
    },
)


@dataclass(frozen=True)
class Request:
    """What one job is asked to do, checked."""

    method: Method
    weight: float
    starting_step: float
    ending_step: float
    resize_mode: ResizeMode
    images: Mapping[Layer, Sequence[Image.Image]]  # those supplied: one for all pictures, or one for each
    prompts: Mapping[Layer, str]  # those with words in them
    passes: int = 0  # of the decoder; 0: as the settings say
    grey_background: bool = False
    chain: "Request | None" = None  # the one that this is a step of

    @property
    def several(self) -> bool:
        """Whether there are other pictures that its pictures belong to."""
        return (self.chain or self).method.frames > 1

    @property
    def injects(self) -> bool:
        """Whether the UNet changes at all: at weight 0, or stopped before the first step, it is the base model."""
        return self.weight > 0 and self.ending_step > 0

    @classmethod
    def parse(cls, args: Sequence[object], changed: Mapping[str, object] = {}) -> "Request | None":
        """The request in these values, one per control or one dict of names; None, and no further look, when off.

        changed: values by name that go before them, of an X/Y/Z plot.
        """
        values = FORM.read(args, changed)
        if values is None:
            return None
        request = cls(
            method=values["method"],
            weight=values["weight"],
            starting_step=values["starting_step"],
            ending_step=values["ending_step"],
            resize_mode=values["resize_mode"],
            images={layer: (given,) for layer in Layer if (given := values[f"{layer.value}_image"]) is not None},
            prompts={layer: words for layer in Layer if (words := values[f"{layer.value}_prompt"].strip())},
            passes=values["passes"],
            grey_background=values["grey_background"],
        )
        request._refuse_missing()
        request._refuse_nothing()
        return request

    def words_before(self, layer: Layer) -> str:
        """What is put before the prompt of a picture of that layer."""
        grey = GREY_BACKGROUND if self.grey_background and layer is Layer.FG else ""
        return ", ".join(filter(None, [self.prompts.get(layer), grey]))

    def for_step(self, step: Step, images: Mapping[Layer, Sequence[Image.Image]]) -> "Request":
        """What one step of the method is asked to do. images: all there are when it begins."""
        method = find_method(step.key)
        given = {layer: images[layer] for layer in method.inputs}
        return replace(self, method=method, ending_step=self._stop_of(step), images=given, chain=self)

    def _stop_of(self, step: Step) -> float:
        return step.stop_at if self.ending_step == 1 else self.ending_step

    def _refuse_missing(self) -> None:
        for layer in self.method.inputs:
            if layer not in self.images:
                name = f"{layer.value}_image"
                raise LayerDiffuseError(
                    f"{self.method.full_title} needs a {layer.word} image. Put one into the {FORM.label(name)} "
                    f"box, or send it as {name}."
                )

    def _refuse_nothing(self) -> None:
        """A start after the stop is a slip; to switch the injection off, people set Weight or Stop At to 0."""
        stop = min(self._stop_of(step) for step in self.method.steps)
        if 0 < self.starting_step >= stop:
            raise LayerDiffuseError(
                f"Start At is {self.starting_step:g} and Stop At is {stop:g}: nothing is left between them. "
                "Set Start At below Stop At."
            )
