"""A loop with accelerate on two replicas.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py

The loop is accelerate's own: prepare, accumulate, clip, step, save_state. Three lines are for the replicas.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muonwire import recipes
from muonwire.integrations import join_replicas
from muonwire.integrations.accelerate import connect

# Before Accelerator, which would take the other replica for a second GPU of this one.
replicas = join_replicas()
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32))
teacher = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)).requires_grad_(False)
inputs = torch.randn(4096, 32)
data = TensorDataset(inputs, teacher(inputs))
loader = DataLoader(replicas.shard(data), batch_size=32, shuffle=True)

optimizer = recipes.one_bit_muon(model, lr=0.01, interval=5, transport=replicas.transport)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)
wire = connect(accelerator, model, optimizer, replicas=replicas)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

losses = []
for x, y in loader:
    with accelerator.accumulate(model):
        loss = (model(x) - y).square().mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    losses.append(loss.item())

digest = wire.synchronize()
accelerator.save_state(str(replicas.folder(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate")))
bits = wire.figures()["muonwire_bits_per_parameter_step"]
print(
    f"replica {replicas.rank}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {bits:.2f} bit per parameter and step, weights {digest}"
)
