"""What the release check does in an environment with the core of muonwire and nothing else.

python release_core.py import       every module of the library is imported; what that takes and what comes with it
python release_core.py snippet      the first Python of the installed README trains two replicas
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import time
from importlib.metadata import metadata
from pathlib import Path

LIBRARY = ("errors", "literals", "codec", "polar", "transport", "stages", "optim", "recipes")
SURROUNDINGS = """
import os
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
mix = torch.randn(16, 16) / 4
torch.manual_seed(1 + int(os.environ["RANK"]))
data = torch.randn(110, 32, 16).unbind()
losses = []


def loss(model, batch):
    value = (model(batch) - batch @ mix).square().mean()
    losses.append(value.item())
    return value
"""
OUTCOME = """
from surroundings import losses

assert len(losses) == len(data), "the snippet did not train on the data"
first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
assert last < first / 2, f"the loss went from {first} to {last}"
assert transport.world_size == 2 and transport.meter.total.sent_bytes > 0
print(f"replica {transport.rank}: loss {first:.3f} to {last:.3f}, {transport.meter.total.sent_bytes:,} bytes sent")
torch.distributed.destroy_process_group()
"""


NEEDS_EXTRA = ("muonwire.transport.elastic_parts", "torchft")


def import_library() -> None:
    """Import the rooms, then each of their modules."""
    begun = time.perf_counter()
    import torch  # noqa: F401

    torch_s, before = time.perf_counter() - begun, set(sys.modules)
    begun = time.perf_counter()
    rooms = [importlib.import_module(f"muonwire.{name}") for name in LIBRARY]
    library_s = time.perf_counter() - begun
    for room in rooms:
        for module in pkgutil.walk_packages(getattr(room, "__path__", []), f"{room.__name__}."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                # The one module that subclasses what an extra brings; it is imported by whom that was given.
                if (module.name, error.name) != NEEDS_EXTRA:
                    raise
    new = set(sys.modules) - before
    own = [name for name in new if name.split(".")[0] == "muonwire"]
    strayed = [name for name in own if "." in name and name.split(".")[1] not in LIBRARY]
    assert not strayed, f"the library imports {strayed}"
    assert "site-packages" in str(importlib.import_module("muonwire").__file__), (
        "this is not the installed package"
    )
    others = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"muonwire"}
    others = sorted(name for name in others if not name.startswith("_"))
    seconds = f"torch {torch_s:.2f} s, then the library {library_s:.2f} s"
    print(f"import: {seconds}; {len(own)} modules; beside torch: {', '.join(others) or 'none'}")


def train_snippet() -> None:
    """Run the README's snippet under torchrun."""
    found = re.search(r"```python\n(.*?)```", str(metadata("muonwire").get_payload()), re.DOTALL)
    assert found, "the README has no Python"
    Path("surroundings.py").write_text(SURROUNDINGS)
    Path("snippet.py").write_text(f"from surroundings import data, loss, model\n{found[1]}{OUTCOME}")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "snippet.py"]
    subprocess.run([sys.executable, *launch], check=True, timeout=300, env={**os.environ, "PYTHONPATH": "."})


if __name__ == "__main__":
    {"import": import_library, "snippet": train_snippet}[sys.argv[1]]()
