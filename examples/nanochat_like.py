"""A script in the manner of nanochat: its GPT, bytes instead of tokens, and one recipe in place of its Muon and AdamW.

    torchrun --nproc-per-node 2 examples/nanochat_like.py

nanochat averages gradients in every step, and gives the matrices to Muon, the embedding and the head to AdamW. The recipe routes
them so by itself, and replicas exchange what their weights changed by, one bit an entry, every 11th step. The text is the
documentation that comes with Python. A number after the program's name is the number of steps.
"""

import sys
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from muonwire import recipes
from muonwire.transport import ProcessGroupTransport, check_replicas

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
WIDTH, HEADS, DEPTH, SEQUENCE, BATCH = 64, 4, 4, 64, 16
Linear = partial(nn.Linear, bias=False)
norm = nn.RMSNorm(WIDTH, elementwise_affine=False)
head_norm = nn.RMSNorm(WIDTH // HEADS, elementwise_affine=False)


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 10000.0 ** -(torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()], -1)


class Block(nn.Module):
    """Attention with normalized queries and keys, then a layer of squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = Linear(WIDTH, 4 * WIDTH), Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Of (batch, sequence, width)."""
        h = norm(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = fn.scaled_dot_product_attention(head_norm(_rotate(q)), head_norm(_rotate(k)), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return torch.add(x, self.down(fn.relu(self.up(norm(x))).square()))


torch.manual_seed(0)
torch.distributed.init_process_group("gloo")
transport = ProcessGroupTransport()
model = nn.Sequential(nn.Embedding(256, WIDTH), *(Block() for _ in range(DEPTH)))
model.add_module("norm", norm)
model.add_module("lm_head", Linear(WIDTH, 256))
optimizer = recipes.one_bit_muon(model, lr=0.02, transport=transport)
if transport.rank == 0:
    print(optimizer)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 1.5 * (1 - step / STEPS)))
text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
draw = torch.Generator().manual_seed(transport.rank)
for step in range(STEPS):
    start = torch.randint(len(text) - SEQUENCE - 1, (BATCH, 1), generator=draw)
    tokens = text[start + torch.arange(SEQUENCE + 1)]
    loss = nn.CrossEntropyLoss()(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if transport.rank == 0 and step % max(STEPS // 5, 1) == 0:
        print(f"step {step}: loss {loss.item():.3f}")
optimizer.synchronize()
digest = check_replicas(model, transport)
bits = 8 * transport.meter.training.sent_bytes / sum(p.numel() for p in model.parameters()) / STEPS
if transport.rank == 0:
    print(f"step {STEPS}: loss {loss.item():.3f}, {bits:.3f} bit per parameter and step, weights {digest}")
torch.distributed.destroy_process_group()
