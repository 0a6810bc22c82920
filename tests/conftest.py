"""For all unit tests."""

import signal

# Shells have background jobs ignore Ctrl-C, and so would the tests of it, and the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
