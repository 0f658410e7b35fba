"""The Python in the documents, and what it uses without making it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of each document: what its snippets use without making it, and whether a process group is made by it or for it.
DOCUMENTS = {
    "README.md": "from stand_ins import data, loss, model",
    "docs/one_bit_muon.md": "from stand_ins import model, transport",
    "docs/optimizer.md": "from stand_ins import model, transport",
    "docs/own_loop.md": "# It makes all that it uses.",
    "docs/choose.md": "from stand_ins import model",
    "docs/prometheus.md": "from stand_ins import data, loss, model",
    "docs/links.md": "from stand_ins import data, loss, model, transport",
}
STAND_INS = '''"""A model, its loss, and a replica's data."""

import torch
from torch import Tensor, nn

from muonwire.transport import SingleReplica, Transport

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
data: list[Tensor] = [torch.randn(8, 4) for _ in range(12)]
transport: Transport = SingleReplica()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    prediction: Tensor = model(batch)
    return (prediction - batch).square().mean()
'''


def snippets(document):
    """The Python of a document, each line at its number there; the first line imports what is not made."""
    code, inside = [DOCUMENTS[document]], False
    for line in (ROOT / document).read_text().splitlines()[1:]:
        fence = line.startswith("```")
        code.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    # PyTorch itself leaves the functions untyped that backward and init_process_group are. Said here rather than by an option of
    # mypy's, which would make it read torch anew.
    return "\n".join([*code, "# mypy: allow-untyped-calls"]) + "\n"
