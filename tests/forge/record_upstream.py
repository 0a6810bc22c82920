"""Write upstream_latents.json: what the existing extension's sampler gives in the installed Forge.

    git clone https://github.com/lllyasviel/sd-forge-layerdiffuse /tmp/upstream
    UPSTREAM_DIR=/tmp/upstream python -m tests.forge.record_upstream

Run it again when GENERATOR_VERSION or the supported Forge changes. The two extensions are never in one process.
What differs in this server from the others, probe/scripts/upstream_recording.py says.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests.forge import data
from tests.forge.client import Forge
from tests.forge.upstream_cases import CASES, TABLE, latents
from tools.forge import ForgeError, find_installation

SERVER = "upstream"


def commit(directory: Path) -> str:
    command = ["git", "-C", str(directory), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()


def record(upstream: Path) -> dict:
    installation = find_installation()
    data.make_models(installation)
    extensions, environment = {"upstream-layerdiffuse": upstream}, {data.RECORDING_VARIABLE: "1"}
    with data.server(installation, SERVER, extensions, environment) as server:
        forge = Forge(server, data.probe_file(SERVER), data.folder_of(SERVER))
        entries = []
        for case in CASES:
            mark = forge.mark()
            entries.append({"case": asdict(case), "latents": latents(forge, case)})
            if "*** Error" in forge.logged_since(mark):
                raise ForgeError(f"The extension failed in {case.name}; see {server.log}.")
            print(f"{case.name}: {forge.calls[-1].seconds:.1f} s", flush=True)
    return {
        "upstream_commit": commit(upstream),
        "forge_commit": installation.commit,
        "generator_version": data.GENERATOR_VERSION,
        "entries": entries,
    }


def in_lines(table: dict) -> str:
    """JSON with one entry a line, so that a change of one case shows as one line."""
    head = {key: value for key, value in table.items() if key != "entries"}
    entries = ",\n".join(json.dumps(entry) for entry in table["entries"])
    return f'{json.dumps(head)[:-1]}, "entries": [\n{entries}\n]}}\n'


def main() -> None:
    upstream = os.environ.get("UPSTREAM_DIR")
    if not upstream:
        sys.exit("Name a checkout of lllyasviel/sd-forge-layerdiffuse in UPSTREAM_DIR.")
    try:
        table = record(Path(upstream).expanduser().absolute())
    except ForgeError as error:
        sys.exit(str(error))
    TABLE.write_text(in_lines(table), encoding="utf-8")


if __name__ == "__main__":
    main()
