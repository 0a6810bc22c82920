"""From a file's tensors to a network: its sizes are read from them, and it holds exactly them."""

from typing import TypeVar

from torch import nn

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.tensors import StateDict

Net = TypeVar("Net", bound=nn.Module)

DIFFERENCES_SHOWN = 3


def children(state_dict: StateDict, prefix: str) -> int:
    """How many modules stand directly below `prefix`: 2 for "resnets." where there are resnets.0.… and resnets.1.…"""
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})


def shape(state_dict: StateDict, key: str) -> tuple[int, ...]:
    if key not in state_dict:
        raise LayerDiffuseError(
            f"no tensor {key} among its {len(state_dict)}: it belongs to something else, or is damaged"
        )
    return tuple(state_dict[key].shape)


def hold(net: Net, state_dict: StateDict) -> Net:
    """`net`, built on the meta device, with the very tensors of `state_dict` as parameters: no copy, no cast."""
    expected = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    differences = [
        f"{key}: found {found.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if differences:
        raise LayerDiffuseError(
            f"{len(differences)} of its {len(state_dict)} tensors do not fit {type(net).__name__} "
            f"({'; '.join(differences[:DIFFERENCES_SHOWN])})"
        )
    net.requires_grad_(False).load_state_dict(state_dict, assign=True)
    return net.eval()
