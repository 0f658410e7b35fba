"""Replicas that come and go, in a loop of one's own.

    torchft_lighthouse --min_replicas 1 --join_timeout_ms 2000 --heartbeat_timeout_ms 1000 --bind 127.0.0.1:29510
    python examples/elastic_loop.py 127.0.0.1:29510 ada
    python examples/elastic_loop.py 127.0.0.1:29510 bob
    python examples/elastic_loop.py 127.0.0.1:29510 eve 100

Each line is a program of its own: the lighthouse knows who is there, and replicas start in any order. They begin as soon as two
are there; one that comes later takes over the others' weights and step. Here eve leaves once step 100 is done, and the others go
on without it. A replica that is killed is left out in the same way.
"""

import sys

import torch
from torch import nn

from muonwire import recipes
from muonwire.optim.elastic import Elastic
from muonwire.transport import digest_all
from muonwire.transport.elastic import ElasticSettings, ElasticTransport

STEPS = 200
lighthouse, name = sys.argv[1:3]
leaves_after = int(sys.argv[3]) if len(sys.argv) > 3 else STEPS

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32))
teacher = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)).requires_grad_(False)
transport = ElasticTransport(ElasticSettings(lighthouse=lighthouse, min_replicas=2, name=name))
optimizer = recipes.one_bit_muon(model, lr=0.01, transport=transport, interval=10)

elastic = Elastic(optimizer, model=model)
elastic.join()
print(f"{name}: begins at step {optimizer.num_steps} with {', '.join(transport.members)}", flush=True)
members = transport.members
loss = torch.tensor(torch.nan)
while optimizer.num_steps < leaves_after:
    # Every step's batch is drawn for those that are there, and each takes its slice.
    number, count = transport.data_slice
    batch = torch.Generator().manual_seed(optimizer.num_steps)
    x = torch.randn(60, 32, generator=batch)[number::count]
    loss = (model(x) - teacher(x)).square().mean()
    loss.backward()
    elastic.step()
    optimizer.zero_grad()
    if transport.members != members:
        members = transport.members
        print(f"{name}: step {optimizer.num_steps}, now with {', '.join(members)}", flush=True)
elastic.synchronize()
with optimizer.shared_weights():
    digest = digest_all(model).hex()
print(f"{name}: ends after step {optimizer.num_steps}, loss {loss.item():.4f}, weights {digest}", flush=True)
elastic.leave()
