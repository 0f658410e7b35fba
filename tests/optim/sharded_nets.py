"""What tests of sharded weights train: shards of uneven lengths, empty ones, vectors, a convolution, tied weights."""

import zlib

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonwire import recipes
from muonwire.transport import mesh_transport
from muonwire.transport.shards import as_sharded, cut_of, is_sharded, place_of

STEPS = 5
OPTIONS = {
    "muon": {"dtype": "float32"},
    "normuon": {"dtype": "float32"},
    "dion": {},
    "distro": {},
    "adamw": {},
    "one_bit_muon": {"dtype": "float32", "interval": 2},
    "powersgd_muon": {"dtype": "float32"},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.convolution = nn.Conv1d(9, 7, 3)
        self.hidden = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 33, bias=False))
        self.norm = nn.LayerNorm(33)
        self.back = nn.Linear(33, 9)
        self.score = nn.Linear(9, 1)
        self.head = nn.Linear(9, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.convolution(self.embedding(tokens).mT).mT
        x = self.back(self.norm(self.hidden(x)))
        return self.head(x) * self.score(x).exp()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model, *, replica, step, half=None):
    generator = torch.Generator().manual_seed(100 * replica + step)
    tokens = torch.randint(0, 11, (8, 6), generator=generator)
    tokens = tokens if half is None else tokens[4 * half : 4 * half + 4]
    return nn.functional.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), tokens[:, 3:].flatten())


def give_gradients(model, *, replica, step):
    """Random gradients, the same numbers whether the weights are sharded or not."""
    for name, param in model.named_parameters():
        seed = zlib.crc32(f"{name} {replica} {step}".encode())
        whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.dtype)
        if is_sharded(param):
            cut = cut_of(param)
            whole = as_sharded(cut.of(whole, place_of(param)).contiguous(), cut, param)
        param.grad = whole


def shard(model, mesh):
    for block in model.hidden:
        if isinstance(block, nn.Linear):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def meshed(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))


def build(name, shape, *, dtype=torch.float32, **options):
    mesh = meshed(shape)
    model, transport = shard(net(dtype), mesh["shard"]), mesh_transport(mesh)
    options = {"lr": 0.02, "transport": transport, **OPTIONS[name], **options}
    return model, recipes.build(name, model, **options)


def advance(model, optimizer, steps):
    for step in steps:
        give_gradients(model, replica=optimizer.transport.rank, step=step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model, optimizer):
    """The whole shared weights."""
    with optimizer.shared_weights():
        return [
            (p.full_tensor() if is_sharded(p) else p).detach().float().clone() for p in model.parameters()
        ]
