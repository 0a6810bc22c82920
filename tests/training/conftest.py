"""What needs the environment of training, which only the newest of the test environments has."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("peft") else ["*.py"]
