"""What a program's patcher must do for us, tried on a model of two weights; run inside the program's own environment.

    <host>/venv/bin/python tests/hosts/contract.py <host> [flags of the host]

No web UI, no checkpoint: ten seconds, most of them torch's. Prints a line for each promise and fails at a broken one.
"""

import sys
from pathlib import Path

HOST = Path(sys.argv[1]).resolve()
PACKAGES = ("packages_3rdparty", "packages", "modules_forge/packages")  # where hosts keep others' code
sys.path[:0] = [str(HOST), *(str(HOST / each) for each in PACKAGES), str(Path(__file__).resolve().parents[2])]
sys.argv[1:] = sys.argv[2:]  # hosts read the rest while they are imported

import torch  # noqa: E402
from torch import nn  # noqa: E402

from lib_layerdiffuse.engine import programs  # noqa: E402
from lib_layerdiffuse.engine.merging import merging_of  # noqa: E402

LORA_KEY, DIFF_KEY = "diffusion_model.lora.weight", "diffusion_model.diff.weight"
UP, DOWN, DIFF = torch.full((6, 2), 0.5), torch.full((2, 4), 0.25), torch.full((4, 4), 0.125)
WEIGHT = 0.5


class Model(nn.Module):
    """As far as a patcher looks at one."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = nn.ModuleDict({"lora": nn.Linear(4, 6), "diff": nn.Linear(4, 4)})

    def weights(self) -> list[torch.Tensor]:
        return [self.get_parameter(key).detach().clone() for key in (LORA_KEY, DIFF_KEY)]


def check(promise: str, kept: bool) -> None:
    print(("kept  " if kept else "BROKEN"), promise)
    if not kept:
        sys.exit(1)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected))


def read_flags() -> None:
    """What the web UI does before it loads a model."""
    if (HOST / "ldm_patched").is_dir():  # does not read the command line by itself (modules_forge/initialization.py)
        from ldm_patched.modules import args_parser

        args_parser.args, _ = args_parser.parser.parse_known_args()
    elif (HOST / "backend" / "args.py").is_file():
        from backend import args

        if isinstance(args.dynamic_args, dict):  # ersatz' memory management asks (modules_forge/main_entry.py sets it)
            args.dynamic_args.setdefault("online_lora", False)


def main() -> None:
    read_flags()
    program = programs.running()
    memory = program.memory
    cpu = torch.device("cpu")
    check("it computes on the processor here", memory.get_torch_device() == cpu)
    model = Model().requires_grad_(False)
    plain = model.weights()
    merged = [plain[0] + WEIGHT * UP @ DOWN, plain[1] + WEIGHT * DIFF]
    base = program.patcher(model, load_device=cpu, offload_device=cpu)

    def job(steps: tuple[bool, ...]) -> tuple[bool, list[list[torch.Tensor]]]:
        """Whether the weights were there from the job before, and what they are at each step."""
        unet = base.clone()
        merging = merging_of(unet, memory.load_models_gpu)
        files = {f"{LORA_KEY}.lora_up.weight": UP, f"{LORA_KEY}.lora_down.weight": DOWN}
        patches = program.load_lora(files, [LORA_KEY]) | {DIFF_KEY: ("diff", (DIFF,))}
        check("it takes every patch", set(merging.add("layerdiffuse x", patches, WEIGHT)) == {LORA_KEY, DIFF_KEY})
        there = merging.is_merged()
        merging.begin(steps[0])
        memory.load_models_gpu([unet])
        found = [model.weights()]
        versions = [merging.version()]
        for on in steps[1:]:
            merging.turn(on)
            found.append(model.weights())
            versions.append(merging.version())
        check("what is in the UNet has a version", len(set(map(str, versions))) == len(set(steps)))
        return there, found

    there, found = job((True, False, True))
    check("LoRA and diff are merged at the weight", close(found[0], merged))
    check("they are taken out in the middle of a job", close(found[1], plain))
    check("and put in again", close(found[2], merged))
    check("they were not there before", not there)
    there, found = job((True,))
    check("the next job finds them merged, or merges them", close(found[0], merged))
    print("merged anew in each job" if not there else "merged once for all jobs")
    _, found = job((False, True))
    check("a start after the first step begins without", close(found[0], plain) and close(found[1], merged))
    memory.load_models_gpu([base.clone()])
    check("an ordinary job afterwards has the plain weights", close(model.weights(), plain))
    check("to the bit", all(map(torch.equal, model.weights(), plain)))
    other = program.patcher(nn.Linear(4, 4), load_device=cpu, offload_device=cpu)
    memory.load_models_gpu([other])
    program.forget(other)
    check(
        "what is forgotten is not loaded any more",
        all(each.model is not other for each in memory.current_loaded_models),
    )


main()
