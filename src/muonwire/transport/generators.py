"""Where torch's generators are, which a replica's dropout and the like draw from."""

from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The states of torch's generators, of the CPU and of GPUs that are in use."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
