"""What injection costs, measured in your own Forge with random weights: time of a step, memory, switching, first jobs.

    python -m benchmarks.injection [--quick | --full] [--out benchmarks/results/injection.json]

FORGE_DIR names the Forge (see tools/forge.py). UPSTREAM_DIR, a checkout of lllyasviel/sd-forge-layerdiffuse, adds it to
the comparison, in a second server of the same Forge. One server works at a time, and requests alternate between the
sides, so that what else the machine does meets all of them alike.

On Linux freed memory stays with the process, as with TCMalloc, which Forge's own webui.sh preloads.

The sides are "plain" (LayerDiffuse off), "ours", "existing" (the other extension), SDXL methods, or ways of switching;
what a figure is, figures.py says.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure, figure, write
from tests.forge import data
from tests.forge.client import SD15_ATTENTION, SD15_JOINT, SDXL_ATTENTION, SDXL_CONV, Forge, layerdiffuse
from tools.forge import ForgeError, Installation, find_installation

PROBE = Path(__file__).parent / "probe"
STEPS_VARIABLE = "LAYERDIFFUSE_STEPS"
METHODS = {"one frame": (SD15_ATTENTION, 1), "three frames": (SD15_JOINT, 3)}
FILES = (
    "synthetic_sd15",
    "synthetic_sdxl",
    "layer_sd15_transparent_attn",
    "layer_sd15_joint",
    "layer_sd15_vae_transparent_decoder",
    "layer_xl_transparent_attn",
    "layer_xl_transparent_conv",
    "vae_transparent_decoder",
)
PLAIN, OURS, EXISTING = "plain", "ours", "existing"
AGAIN = "plain again"  # what it differs by from plain is what two runs of the same differ by
MIB = 2**20
SWITCH_STEPS = 4  # even: a switch in the middle falls between two of them
SDXL_SIZE = 128


@dataclass(frozen=True)
class Plan:
    """How often what is measured. rounds: how often all sides take a turn, by size and method."""

    starts: int
    rounds: Mapping[tuple[int, str], int]
    timed_steps: int
    sdxl: Sequence[str]
    sdxl_rounds: int
    switches: int


PLANS = {
    "quick": Plan(1, {(256, "one frame"): 2, (256, "three frames"): 1}, 2, (SDXL_ATTENTION, SDXL_CONV), 1, 1),
    "full": Plan(
        2,
        {(256, "one frame"): 3, (256, "three frames"): 8, (512, "one frame"): 2, (512, "three frames"): 1},
        2,
        (SDXL_ATTENTION, SDXL_CONV),
        10,
        2,
    ),
}


# --- servers and jobs -------------------------------------------------------------------------------------------


@contextmanager
def running(installation: Installation, side: str, extensions: Mapping[str, Path]) -> Iterator[Forge]:
    name = f"benchmark-{side}"
    steps = data.folder_of(name) / "steps.jsonl"
    environment = {STEPS_VARIABLE: str(steps)}
    server = data.server(installation, name, {**extensions, "layerdiffuse-steps": PROBE}, environment, precision=())
    steps.write_text("", encoding="utf-8")
    with server:
        forge = Forge(server, steps, data.folder_of(name))
        forge.use("sd15")
        yield forge


def job(forge: Forge, *fields: dict, steps: int, counts: bool = False, pictures: bool = False, **more) -> list[dict]:
    """What the probe wrote for each step."""
    probing = {"alwayson_scripts": {"LayerDiffuse steps": {"args": [counts, pictures]}}}
    with forge.probed() as lines:
        answer = forge.txt2img(probing, *fields, steps=steps, **more)
    if answer.status != 200 or len(lines) != steps:
        raise ForgeError(f"A job failed with {answer.status}, {len(lines)} of {steps} steps; see {forge.server.log}.")
    return lines


def seconds(lines: Sequence[dict]) -> list[float]:
    return [line["seconds"] for line in lines]


def memory(forge: Forge) -> dict[str, float]:
    """MiB of the server's own memory, freed or not, and of files that it has mapped; nothing but on Linux."""
    rollup = Path(f"/proc/{forge.server.process.pid}/smaps_rollup")
    if not rollup.exists():
        return {}
    kib = dict(re.findall(r"^(\w+): +(\d+) kB", rollup.read_text(encoding="utf-8"), re.MULTILINE))
    own, all_of_it = int(kib["Anonymous"]) / 1024, int(kib["Rss"]) / 1024
    return {"private": own, "mapped": all_of_it - own}


# --- figures ----------------------------------------------------------------------------------------------------


class Comparison:
    """The sides of SD1.5: LayerDiffuse off and on in our server, and the existing extension where there is one."""

    def __init__(self, ours: Forge, existing: "Forge | None", plan: Plan) -> None:
        self.servers = {PLAIN: ours, OURS: ours} | ({EXISTING: existing} if existing else {})
        self.plan = plan

    def run(self, side: str, method: str, **more) -> list[dict]:
        return job(self.servers[side], layerdiffuse(method) if side != PLAIN else {}, **more)

    def steps(self) -> Iterator[Figure]:
        for (size, what), rounds in self.plan.rounds.items():
            yield from self.of_method(size, what, rounds)

    def of_method(self, size: int, what: str, rounds: int) -> Iterator[Figure]:
        method, frames = METHODS[what]
        of_job = {"width": size, "height": size, "batch_size": frames}
        timed: dict[str, list[float]] = {side: [] for side in self.servers}
        first: dict[str, list[float]] = {side: [] for side in self.servers}
        for _ in range(rounds):
            for side in self.servers:
                made, *others = seconds(self.run(side, method, steps=1 + self.plan.timed_steps, **of_job))
                timed[side] += others
                first[side].append(made - median(others))
        pairs = ("ours / plain", "existing / plain", "ours / existing")
        name = f"SD1.5, {what}, {size}x{size}"
        demand = {"ours / plain": {1: 1.15, 3: 1.30}[frames], "ours / existing": 0.85}
        yield figure(f"{name}: step", "s", timed, *pairs, demand=demand)
        yield figure(f"{name}: what a job's first step takes beyond the others", "s", first, detail=True)
        counted = {  # our first step merges weights
            side: self.run(side, method, steps=1 + (side == OURS), counts=True, **of_job)[-1] for side in timed
        }
        giga = {side: [line["operations"] / 1e9] for side, line in counted.items()}
        what = "operations of a step's products (their ratio bounds the times')"
        yield figure(f"{name}: {what}", "GFLOP", giga, *pairs, detail=True)
        if used := {side: [line["device_bytes"] / MIB] for side, line in counted.items() if "device_bytes" in line}:
            yield figure(f"{name}: highest memory of each server's GPU so far", "MiB", used)

    def switches(self) -> Iterator[Figure]:
        fields = {f"{side} stops": (side, layerdiffuse(SD15_ATTENTION, stop=0.5)) for side in self.servers}
        fields["ours starts"] = OURS, starting(SD15_ATTENTION)
        del fields["plain stops"]
        jobs = {name: (self.servers[side], field) for name, (side, field) in fields.items()}
        yield from switching("SD1.5", 256, jobs, self.plan.switches)


def starting(method: str) -> dict:
    return {"alwayson_scripts": {"LayerDiffuse": {"args": [{"method": method, "start_at": 0.5}]}}}


def switching(family: str, size: int, jobs: Mapping[str, tuple[Forge, dict]], rounds: int) -> Iterator[Figure]:
    """What the first step after a switch at half of the steps takes beyond those that follow."""
    samples: dict[str, list[float]] = {side: [] for side in jobs}
    for _ in range(rounds):
        for side, (forge, field) in jobs.items():
            times = seconds(job(forge, field, steps=SWITCH_STEPS, width=size, height=size))
            switch, *others = times[SWITCH_STEPS // 2 :]
            samples[side].append(switch - median(others))
    yield figure(f"{family}, {size}x{size}: switching within a job, beyond a step", "s", samples)


@dataclass(frozen=True)
class FirstJobs:
    """Of a server just started: how long its first two jobs take with their pictures, and its memory after them."""

    first: float
    second: float
    memory: Mapping[str, float]

    @classmethod
    def of(cls, forge: Forge, field: dict) -> "FirstJobs":
        times = []
        for _ in range(2):
            started = time.monotonic()
            job(forge, field, steps=1, pictures=True, width=256, height=256)
            times.append(time.monotonic() - started)
        return cls(*times, memory(forge))


def first_jobs(found: Mapping[str, Sequence[FirstJobs]]) -> Iterator[Figure]:
    """found: of each side's servers. Our tests' settings decode in one pass, the existing extension always in eight."""
    name = "SD1.5, one frame, 256x256, 1 step"
    for which in ("first", "second"):
        times = {side: [getattr(one, which) for one in several] for side, several in found.items()}
        yield figure(f"{name}: {which} job after a start, with its pictures", "s", times)
    for kind in found[OURS][0].memory:
        used = {side: [one.memory[kind] for one in several] for side, several in found.items()}
        yield figure(f"{name}: {kind} memory after two jobs", "MiB", used, detail=kind != "private")


def sdxl(forge: Forge, plan: Plan) -> Iterator[Figure]:
    forge.use("sdxl")
    sides = {PLAIN: {}} | {method: layerdiffuse(method) for method in plan.sdxl} | {AGAIN: {}}
    size = {"width": SDXL_SIZE, "height": SDXL_SIZE}
    timed: dict[str, list[float]] = {side: [] for side in sides}
    used: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(plan.sdxl_rounds):
        for side, field in sides.items():
            timed[side] += seconds(job(forge, field, steps=1 + plan.timed_steps, **size))[1:]
            used[side].append(memory(forge))
    ratios = [f"{side} / {PLAIN}" for side in sides if side != PLAIN]
    name = f"SDXL, {SDXL_SIZE}x{SDXL_SIZE}"
    demand = {f"{method} / {PLAIN}": 1.02 for method in plan.sdxl}
    yield figure(f"{name}: step", "s", timed, *ratios, demand=demand)
    counted = {side: job(forge, field, steps=2, counts=True, **size)[-1] for side, field in sides.items()}
    giga = {side: [line["operations"] / 1e9] for side, line in counted.items()}
    yield figure(f"{name}: operations of a step's products", "GFLOP", giga, *ratios, detail=True)
    for kind in used[PLAIN][0]:
        of_kind = {side: [one[kind] for one in several] for side, several in used.items()}
        yield figure(f"{name}: {kind} memory after a job", "MiB", of_kind, detail=kind != "private")
    jobs = {"stops": layerdiffuse(SDXL_ATTENTION, stop=0.5), "starts": starting(SDXL_ATTENTION)}
    yield from switching("SDXL", SDXL_SIZE, {key: (forge, field) for key, field in jobs.items()}, plan.switches)
    yield merges(forge)


def merges(forge: Forge) -> Figure:
    """How often weights are merged when the settings change once in four jobs, from those of the job before."""
    mark = forge.mark()
    for weight in (0.5, 0.5, 0.75, 0.75):
        job(forge, layerdiffuse(SDXL_ATTENTION, weight), steps=1)
    found = forge.logged_since(mark).count("merging layer_")
    return figure("SDXL: merges in four jobs with two settings", "merges", {OURS: [found]}, demand={OURS: 2})


# --- the program ------------------------------------------------------------------------------------------------


def measure(plan: Plan) -> Iterator[Figure]:
    installation = find_installation()
    data.make_models(installation, FILES)
    extensions = {PLAIN: {}, OURS: data.OURS}
    if upstream := os.environ.get("UPSTREAM_DIR"):
        extensions[EXISTING] = {"upstream-layerdiffuse": Path(upstream).expanduser().absolute()}
    fields = {side: {} if side == PLAIN else layerdiffuse(SD15_ATTENTION) for side in extensions}
    found: dict[str, list[FirstJobs]] = {side: [] for side in extensions}

    @contextmanager
    def started(side: str) -> Iterator[Forge]:
        with running(installation, side, extensions[side]) as forge:
            found[side].append(FirstJobs.of(forge, fields[side]))
            yield forge

    for side in (*(plan.starts - 1) * tuple(extensions), PLAIN):
        with started(side):
            pass
    with started(OURS) as ours:
        with ExitStack() as stack:
            existing = stack.enter_context(started(EXISTING)) if EXISTING in extensions else None
            yield from first_jobs(found)
            comparison = Comparison(ours, existing, plan)
            yield from comparison.steps()
            yield from comparison.switches()
        yield from sdxl(ours, plan)


def machine(installation: Installation) -> dict:
    gpu = "torch.cuda.is_available() and torch.cuda.get_device_name()"
    asked = f"import json, torch; print(json.dumps([torch.__version__, torch.get_num_threads(), {gpu}]))"
    answer = subprocess.run([installation.python, "-c", asked], check=True, capture_output=True).stdout
    torch, threads, gpu = json.loads(answer)
    return {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "threads": threads,
        "gpu": gpu or None,
        "torch": torch,
        "forge": installation.commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plans = parser.add_mutually_exclusive_group()
    for name in PLANS:
        plans.add_argument(f"--{name}", dest="plan", action="store_const", const=name, default="quick")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/injection.json"))
    arguments = parser.parse_args()
    try:
        about, figures = {**machine(find_installation()), "plan": arguments.plan}, []
        for entry in measure(PLANS[arguments.plan]):
            figures.append(entry)
            write(arguments.out, about, figures)
    except ForgeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
