"""accelerate on replicas: against our own loop on the same batches, saved and loaded, and what it refuses."""

import json

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.integrations import Replicas
from muonwire.transport import SingleReplica
from tests.integrations.launched import all_good, launched

ACCELERATE = ("accelerate", "muonwire.integrations.accelerate", "tests.integrations.tiny")
RECIPES = ("one_bit_muon(interval=2)", "muon", "distro")


def prepared(replicas, recipe, *, data=None, **options):
    """An accelerator and everything that it has prepared."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import get_scheduler

    from muonwire.integrations.accelerate import connect
    from tests.integrations import tiny

    name, given = recipes.parse_recipe(recipe)
    accelerator = Accelerator(gradient_accumulation_steps=tiny.ACCUMULATE, cpu=True)
    model = tiny.llama().train()
    seen = tiny.watched(model)
    loader = DataLoader(replicas.shard(tiny.Tokens()) if data is None else data, batch_size=tiny.BATCH)
    optimizer = recipes.build(
        name, model, lr=tiny.RATE, weight_decay=tiny.DECAY, transport=replicas.transport, **given
    )
    scheduler = get_scheduler("linear", optimizer, 0, tiny.STEPS)
    wire = connect(accelerator, model, optimizer, replicas=replicas, **options)
    return accelerator, wire, accelerator.prepare(model, optimizer, loader, scheduler), seen


def train(accelerator, things, *, first=1, last):
    """Steps ``first`` to ``last``."""
    from accelerate import skip_first_batches

    from tests.integrations import tiny

    model, optimizer, loader, scheduler = things
    batches = iter(skip_first_batches(loader, (first - 1) * tiny.ACCUMULATE))
    for _ in range((last - first + 1) * tiny.ACCUMULATE):
        with accelerator.accumulate(model):
            accelerator.backward(model(**next(batches)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def mean_loss(model, batch, count):
    from tests.integrations import tiny

    return model(**batch).loss / tiny.ACCUMULATE


def saved_and_loaded(out):
    from muonwire.integrations import join_replicas
    from tests.integrations import tiny

    joined = join_replicas()
    link, found = joined.transport, {}
    for recipe in RECIPES:
        replicas = Replicas(tiny.fresh(link))
        folder = str(replicas.folder(f"{out}/{recipe}"))
        accelerator, wire, things, first = prepared(replicas, recipe)
        # In the middle of an interval: each replica has steps of its own.
        train(accelerator, things, last=tiny.STOP)
        accelerator.save_state(folder)
        replicas = Replicas(tiny.fresh(link))
        accelerator, wire, things, second = prepared(replicas, recipe)
        accelerator.load_state(folder)
        train(accelerator, things, first=tiny.STOP + 1, last=tiny.STEPS)
        digest = wire.synchronize()
        batches, at_end = [*first, *second], (tiny.STEPS,)
        plain, _ = tiny.plain_loop(recipe, batches, [tiny.fresh(link)], loss=mean_loss, synchronized=at_end)
        again, sent = tiny.plain_loop(
            recipe, batches, [tiny.fresh(link), tiny.fresh(link)], loss=mean_loss, synchronized=at_end
        )
        found[recipe] = {
            "weights": tiny.weights(things[0]),
            "plain": [plain, again],
            "sent": sent,
            "figures": wire.figures(),
            "digest": digest,
            "num_batches": len(batches),
            "inputs": [b["input_ids"] for b in batches],
        }
    return found | {"said": refused(joined, out)}


def refused(replicas, out):
    from tests.integrations import tiny

    said = {}

    def attempt(what, do):
        try:
            do()
        except UsageError as error:
            said[what] = str(error)

    accelerator, _, things, _ = prepared(replicas, "muon", data=tiny.Tokens())
    attempt("same data", lambda: train(accelerator, things, last=1))
    accelerator, _, things, _ = prepared(replicas, "muon", data=tiny.Tokens(), same_data=True)
    attempt("same data, meant", lambda: train(accelerator, things, last=1))
    other = f"{out}/muon/replica_{1 - replicas.rank}"
    attempt("another's, loaded", lambda: accelerator.load_state(other))
    attempt("another's, saved", lambda: accelerator.save_state(other))
    attempt("one folder", lambda: accelerator.save_state(f"{out}/shared"))
    attempt("another transport", lambda: prepared(Replicas(SingleReplica()), "muon")[1] and mixed(replicas))
    return said


def mixed(replicas):
    from accelerate import Accelerator

    from muonwire.integrations.accelerate import connect
    from tests.integrations import tiny

    model = tiny.llama()
    connect(Accelerator(cpu=True), model, recipes.muon(model, lr=0.1), replicas=replicas)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("accelerate"))
    return all_good(launched(saved_and_loaded, 2, folder, modules=ACCELERATE))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_training_is_our_own_loop_on_the_same_batches(replicas, recipe):
    first, second = (r[recipe] for r in replicas)
    for found in (first, second):
        assert found["num_batches"] == 12
        for plain in found["plain"]:
            for name, weight in plain.items():
                assert torch.equal(found["weights"][name], weight), name
        assert found["figures"]["muonwire_sent_bytes"] == found["sent"] > 0
    assert first["digest"] == second["digest"]
    samples = torch.cat([*first["inputs"], *second["inputs"]])
    assert len(samples.unique(dim=0)) == len(samples) == 2 * 12 * 4


def test_what_cannot_hold_for_replicas_is_refused(replicas):
    for rank, said in enumerate(r["said"] for r in replicas):
        assert "processes 0 and 1 of 2 took their first step on the same data" in said["same data"]
        assert "same data, meant" not in said
        assert f"is the state of replica {1 - rank}, this is replica {rank} of 2" in said["another's, loaded"]
        assert f"is the state of replica {1 - rank}, this is replica {rank}" in said["another's, saved"]
        assert "one folder" in replicas[0]["said"] | replicas[1]["said"]
        assert "transport (SingleReplica) is not that of the replicas" in said["another transport"]


def test_a_state_saved_without_connect_is_not_taken_for_a_replicas_own(tmp_path):
    accelerator, _, things, _ = prepared(Replicas(SingleReplica()), "muon")
    train(accelerator, things, last=1)
    accelerator.save_state(str(tmp_path))
    note = tmp_path / "muonwire_replica_0.json"
    whose = json.loads(note.read_text())
    assert (whose["replicas"], whose["total"]["step"]) == (1, 1)
    note.unlink()
    with pytest.raises(UsageError, match="saved without connect"):
        accelerator.load_state(str(tmp_path))


def test_an_optimizer_that_is_no_recipes_is_refused():
    from accelerate import Accelerator

    from muonwire.integrations.accelerate import connect

    model = torch.nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(recipes.muon(model, lr=0.1))
    for optimizer in (torch.optim.SGD(model.parameters()), prepared):
        with pytest.raises(
            UsageError, match=f"is a {type(optimizer).__name__}, .* before accelerator.prepare"
        ):
            connect(accelerator, model, optimizer, replicas=Replicas(SingleReplica()))
