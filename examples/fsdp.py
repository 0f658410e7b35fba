"""Sharded weights inside a replica, one-bit Muon between replicas.

    torchrun --nproc-per-node 4 examples/fsdp.py

Two replicas of two processes each. `fully_shard` cuts the weights of a replica between its processes, on a fast link; every fifth
step the replicas exchange the signs of what their weights changed by, on a slow one.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonwire import recipes
from muonwire.transport import check_replicas, mesh_transport

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
mesh = init_device_mesh(device, (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).to(
    device
)
teacher = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).to(device).requires_grad_(False)
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh["shard"])
fully_shard(model, mesh=mesh["shard"])
transport = mesh_transport(mesh)
optimizer = recipes.one_bit_muon(model, lr=0.01, transport=transport, interval=5, dtype="float32")
if dist.get_rank() == 0:
    print(optimizer)

data = torch.Generator().manual_seed(dist.get_rank())
losses = []
for _ in range(50):
    x = torch.randn(64, 64, generator=data).to(device)
    loss = (model(x) - teacher(x)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

digest = check_replicas(model.named_parameters(), transport)
sums = torch.tensor([transport.meter.training.sent_bytes, losses[0], losses[-1]], device=device)
dist.all_reduce(sums)
num_parameters = sum(p.numel() for p in model.parameters())
# What both replicas have sent.
bits = 8 * sums[0].item() / 2 / num_parameters / len(losses)
if dist.get_rank() == 0:
    first, last = (sums[1:] / dist.get_world_size()).tolist()
    print(f"loss {first:.4f} -> {last:.4f}, {bits:.3f} bit per parameter and step, weights {digest}")
dist.destroy_process_group()
