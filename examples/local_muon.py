"""Local Muon on a model of your own.

    torchrun --nproc-per-node 2 examples/local_muon.py

Each replica trains on its own data; every fifth step they exchange what their weights changed by, at about a
tenth of a bit a parameter and step.
"""

import torch
from torch import nn

from muonwire import recipes
from muonwire.transport import ProcessGroupTransport, check_replicas

torch.distributed.init_process_group("gloo")
transport = ProcessGroupTransport()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
teacher = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).requires_grad_(False)
optimizer = recipes.local_muon(model, lr=0.01, transport=transport, interval=5, density=0.1)
if transport.rank == 0:
    print(optimizer)

data = torch.Generator().manual_seed(transport.rank)
losses = []
for _ in range(50):
    x = torch.randn(128, 64, generator=data)
    loss = (model(x) - teacher(x)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

digest = check_replicas(model.named_parameters(), transport)
num_parameters = sum(p.numel() for p in model.parameters())
bits = 8 * transport.meter.training.sent_bytes / num_parameters / len(losses)
if transport.rank == 0:
    print(
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {bits:.3f} bit per parameter and step, weights {digest}"
    )
torch.distributed.destroy_process_group()
