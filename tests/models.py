"""Small models that tests train."""

import math

import torch
from torch import nn
from torch.nn.utils import skip_init

# Options that a recipe needs to fit this net's names, and the few steps that tests take.
RECIPE_OPTIONS = {
    "approach_d": {"dense": ["up"]},
    "one_bit_muon": {"interval": 3},
    "muloco": {"interval": 3},
    "diloco": {"interval": 3},
    "sparseloco": {"interval": 3},
}
# Options that change what a recipe exchanges or keeps, so that they have to pass the recipes' contract too.
VARIANTS = [
    ("approach_b", {"server": True, "owners": "all"}),
    ("psyche", {"delayed": True}),
    (
        "one_bit_muon",
        {
            "interval": 3,
            "codec": "sign(scale=shared)",
            "vector_codec": "sign(scale=shared)",
            "means": "lossless",
        },
    ),
    ("one_bit_muon", {"interval": 3, "means": "recompressed"}),
    ("one_bit_muon", {"interval": 3, "parts": 2, "lengthen": True}),
    ("ef14_muon", {"means": "recompressed"}),
    ("muonfast", {"preconditioner": "before", "polar_at_least": 8, "keep_norm": True}),
    ("muonfast", {"preconditioner": "after", "rest": "adam"}),
    # At the fourth step nothing is in flight, one of two fragments is, and the whole model is.
    ("one_bit_muon", {"interval": 3, "fragments": 2, "delay": 1}),
    ("diloco", {"interval": 3, "fragments": 2, "delay": 2, "mix": 1.0}),
    ("one_bit_muon", {"interval": 4, "delay": 3}),
    ("local_muon", {"interval": 4, "merge": "arrival"}),
    ("one_bit_muon", {"interval": [(0, 3), (3, 2)]}),
    ("one_bit_muon", {"interval": [(0, 3), (3, 4)], "fragments": 2, "delay": 1}),
    *(("dion", {"fraction": fraction}) for fraction in (1.0, 0.5, 0.25, 0.125)),
]
# Recipes that take the same ways through exchanges and states as others do, in what is the same for every recipe.
LIKE_OTHERS = (
    "local_adamw",
    "demo",
    "muloco",
    "sgd",
    "normuon",
    "approach_a",
    "approach_c",
    "approach_e",
    "pre_polar",
    "distro_weight_polar",
    "sgd_weight_polar",
    "signmuon",
    "gda2",
)


def goes_its_own_way(_, name, options):
    """Whether a case, as ``slow_unless`` asks, is not like others in what is the same for every recipe."""
    return name not in LIKE_OTHERS and not (name == "dion" and "fraction" in options)


def begin(model, seed):
    """Fill a model as its modules would by themselves, without torch's generator, which all threads of a process share."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    return model


class SmallNet(nn.Module):
    """An embedding, a hidden matrix of each orientation, a norm, biases and a tied head."""

    def __init__(self, seed=0, vocabulary=16, width=8, hidden=12):
        super().__init__()
        self.embed = skip_init(nn.Embedding, vocabulary, width)
        self.up = skip_init(nn.Linear, width, hidden)
        self.down = skip_init(nn.Linear, hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        begin(self, seed)
        self.lm_head = skip_init(nn.Linear, width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def batch(step, rank=0, world_size=1, size=6, vocabulary=16):
    """The part of a step's joined batch that belongs to ``rank``."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(vocabulary, (size * world_size, 5), generator=generator)
    return tokens[rank * size : (rank + 1) * size]


def loss(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, steps, *, start=0, rank=0, world_size=1, joined=False):
    """Train, and return the losses; ``joined``: this one process sees all replicas' batches."""
    losses = []
    for step in range(start, start + steps):
        if joined:
            tokens = torch.cat([batch(step, r, joined) for r in range(joined)])
        else:
            tokens = batch(step, rank, world_size)
        optimizer.zero_grad()
        value = loss(model, tokens)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
