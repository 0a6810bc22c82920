"""Memory that was freed, given back to the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Where the C library would keep it, as glibc does for the thread that had it.

    A web UI's API runs each job in another thread: after some changes of weights these were gigabytes. It takes some
    hundredths of a second.
    """
    if sys.platform != "linux":  # on Windows, ctypes raises TypeError where a library has no name
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)
