"""Two hosts on a slow link, joined by torchrun.

    torchrun --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29400 --nproc-per-node 1 examples/two_hosts.py
    torchrun --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29400 --nproc-per-node 1 examples/two_hosts.py

The first line is for the host whose address is 10.0.0.1, the second for the other one. ``join`` finds the interface that leads
there, and names whoever does not come or cannot be reached within 30 seconds. Where a file with a secret is on both hosts
(``muonwire secret FILE``), name it in ``MUONWIRE_SECRET_FILE``: messages of strangers are then refused.

Each host draws data of its own. While it waits for the other one for long, a line on standard error says so.
"""

import torch
from torch import nn

from muonwire import recipes
from muonwire.transport import ProcessGroupTransport, check_replicas, watching
from muonwire.transport.rendezvous import join
from muonwire.transport.secret import find_secret

STEPS = 60
secret = find_secret()
interface = join(backend="gloo", secret=secret)
transport = ProcessGroupTransport(secret=secret)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
teacher = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).requires_grad_(False)
optimizer = recipes.one_bit_muon(model, lr=0.01, transport=transport, interval=10)

data = torch.Generator().manual_seed(transport.rank)
losses = []
with watching(transport.waits):
    for _ in range(STEPS):
        x = torch.randn(128, 64, generator=data)
        loss = (model(x) - teacher(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.synchronize()
    digest = check_replicas(model, transport)

traffic = transport.meter.total
print(
    f"host {transport.rank} on {interface.name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
    f"{traffic.egress_bytes / 1e3:.1f} kB sent, {traffic.received_bytes / 1e3:.1f} kB received, weights {digest}",
    flush=True,
)
transport.close()
torch.distributed.destroy_process_group()
