"""Memory that was freed, given back to the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """glibc keeps what is freed for the thread that had it, and web UIs run each job in another one: after some changes
    of weights these were gigabytes. Returning them takes some hundredths of a second. Other systems need no such call.
    """
    if sys.platform != "linux":  # on Windows, asking for the C library like this raises TypeError
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)
