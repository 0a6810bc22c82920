"""LayerDiffuse without a web UI: `python -m lib_layerdiffuse --help`.

What ends it early is said here, in a sentence and an exit code; so nothing that takes time is imported before `main`.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from lib_layerdiffuse.errors import LayerDiffuseError

FAILED, INTERRUPTED, TERMINATED = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells count signals


def main(words: Sequence[str] | None = None) -> None:
    """Run a command. words: the command line, if not the program's own. Raises SystemExit where there is no answer."""
    try:
        from lib_layerdiffuse.cli.commands import run

        try:
            run(words)
        finally:
            sys.stdout.flush()  # here, where it can be said that nobody reads
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # what was not read must not be tried again at the very end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except ImportError as error:
        remedy = "pip install -r examples/requirements.txt, or the wheel with [cli]"
        sys.exit(f"{str(error).strip()}. Install what this command needs: {remedy}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except (LayerDiffuseError, ValueError) as error:
        sys.exit(str(error))
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        sys.exit("There is not enough memory for this. Choose a smaller size, fewer pictures or another --device.")


def ran_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    from lib_layerdiffuse.vae import is_out_of_memory

    return isinstance(error, MemoryError) or is_out_of_memory(error)


def terminated(*_: object) -> None:
    """Leave as after Ctrl-C, with nothing half written; a second signal does not wait for that."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(TERMINATED)


def unraisable(found: Any) -> None:
    """Both may come while Python runs what cannot raise, such as a finalizer: it would report them and go on."""
    if isinstance(found.exc_value, (KeyboardInterrupt, SystemExit)):
        os._exit(INTERRUPTED if isinstance(found.exc_value, KeyboardInterrupt) else TERMINATED)
    sys.__unraisablehook__(found)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    sys.unraisablehook = unraisable
    main()
