"""The contract in each installed host's own environment."""

import os
import subprocess
from pathlib import Path

import pytest

from tools.forge import HOSTS, ForgeError, find_installation

CONTRACT = Path(__file__).with_name("contract.py")
LIMIT_S = 300  # ten on an idle machine


@pytest.mark.parametrize("name", HOSTS)
def test_a_program_s_patcher_does_what_we_count_on(name: str) -> None:
    try:
        found = find_installation({**os.environ, "HOST": name})
    except ForgeError as error:
        pytest.skip(str(error))
    cpu = next(flag for flag in found.host.without_gpu if "cpu" in flag)
    command = [str(found.python), "-u", str(CONTRACT), str(found.directory), cpu]
    said = subprocess.run(
        command, cwd=found.directory, capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    assert said.stdout.count("kept  ") >= 10
