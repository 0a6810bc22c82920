"""A Chromium for the tests of the page: find one, or install one.

    python tools/browser.py     print where it is, after installing it where there was none

LAYERDIFFUSE_BROWSER  the program to use; default: the Chromium or Chrome on PATH, else Playwright's own
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

WINDOWS = os.name == "nt"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# One after the other, until there is a browser that runs: Playwright's own may lack libraries of the system.
INSTALLERS = (
    (sys.executable, "-m", "playwright", "install", "chromium"),
    ("apt-get", "update"),
    ("apt-get", "install", "--yes", "--no-install-recommends", "chromium"),
)
INSTALL_LIMIT_S = 600
START_LIMIT_S = 60


class BrowserError(Exception):
    """Why there is no browser, in one sentence."""


def find_browser(environment: Mapping[str, str] = os.environ) -> "str | None":
    """The program's path, if there is one that runs. Raises BrowserError where another was asked for by name."""
    named = environment.get("LAYERDIFFUSE_BROWSER")
    if named and not runs(named):
        raise BrowserError(f"LAYERDIFFUSE_BROWSER is {named}, which does not run: name a Chromium or Chrome there.")
    candidates = (named, *map(shutil.which, NAMES), playwrights_own())
    return next((path for path in candidates if path and runs(path)), None)


def playwrights_own() -> str:
    """Where `playwright install chromium` puts it."""
    from playwright.sync_api import sync_playwright  # here: only the environment of the page's tests has it

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def runs(path: str) -> bool:
    """Whether it starts here: the file may be there, and libraries that it needs not."""
    if WINDOWS:  # where Chromium takes no notice of --version, and opens a window
        return Path(path).is_file()
    with suppress(OSError, subprocess.TimeoutExpired):
        command = [path, "--version"]
        return subprocess.run(command, capture_output=True, timeout=START_LIMIT_S, check=False).returncode == 0
    return False


def install() -> str:
    """A browser that was not there before. What the installers say goes to the terminal; none asks anything."""
    for command in INSTALLERS:
        print("No browser yet:", *command, flush=True)
        with suppress(OSError, subprocess.TimeoutExpired):  # OSError: this system has no such installer
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=INSTALL_LIMIT_S, check=False)
        if found := find_browser():
            return found
    raise BrowserError(
        "There is no Chromium or Chrome, and none could be installed: install one, or name it in LAYERDIFFUSE_BROWSER."
    )


def main() -> None:
    try:
        print(find_browser() or install())
    except BrowserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
