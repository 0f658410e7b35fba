"""A tiny Llama, tokens for it, and the plain loop that frameworks are compared with. Imported by replicas' processes."""

import torch
from transformers import get_scheduler

from muonwire import recipes
from muonwire.transport import check_replicas
from tests.small_lm import small_llama

RATE, DECAY, STEPS, STOP, BATCH, ACCUMULATE = 0.01, 0.02, 6, 3, 4, 2


class Tokens(torch.utils.data.Dataset):
    def __init__(self, first=0, length=160):
        self.first, self.length = first, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(self.first + index))
        return {"input_ids": tokens, "labels": tokens}


class Stream(torch.utils.data.IterableDataset):
    """The same samples without a length."""

    def __iter__(self):
        return (sample for sample in map(Tokens().__getitem__, range(160)))


def llama():
    torch.manual_seed(0)
    return small_llama(vocabulary=64, layers=1, max_position_embeddings=32)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def watched(model):
    """What goes into the model while it trains, as it comes."""
    seen = []

    def see(module, args, kwargs):
        if module.training:
            seen.append({key: kwargs[key].clone() for key in ("input_ids", "labels")})

    model.register_forward_pre_hook(see, with_kwargs=True)
    return seen


def fresh(transport):
    """A transport between the same replicas that has carried nothing yet."""
    return transport.channel().transport


def plain_loop(recipe, batches, transports, *, loss, synchronized=(STOP, STEPS)):
    """Our own loop on the same batches.

    Args:
        recipe: as text.
        batches: of all steps, ``ACCUMULATE`` a step.
        transports: one for the whole run, or two: of a run that is saved after step ``STOP`` and goes on anew.
        loss: (model, batch, labels in the whole step) to the loss that the framework takes.
        synchronized: after which steps the replicas synchronize and compare.

    Returns:
        the weights, and the bytes sent.
    """
    name, options = recipes.parse_recipe(recipe)

    def begin(transport):
        model = llama().train()
        optimizer = recipes.build(name, model, lr=RATE, weight_decay=DECAY, transport=transport, **options)
        return model, optimizer, get_scheduler("linear", optimizer, 0, STEPS)

    model, optimizer, scheduler = begin(transports[0])
    for step in range(1, STEPS + 1):
        of_step = batches[(step - 1) * ACCUMULATE : step * ACCUMULATE]
        for batch in of_step:
            loss(model, batch, sum(b["labels"][..., 1:].numel() for b in of_step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step in synchronized:
            optimizer.synchronize()
            check_replicas(optimizer.named_parameters(), optimizer.transport)
        if step == STOP and len(transports) == 2:
            saved = weights(model), optimizer.state_dict(), scheduler.state_dict()
            model, optimizer, scheduler = begin(transports[1])
            model.load_state_dict(saved[0], strict=False)
            optimizer.load_state_dict(saved[1])
            scheduler.load_state_dict(saved[2])
    return weights(model), sum(t.meter.training.sent_bytes for t in transports)
