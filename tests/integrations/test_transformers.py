"""transformers' Trainer on replicas: against our own loop on the same batches, interrupted and resumed, and what it refuses."""

import importlib
import sys

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.integrations import Replicas
from muonwire.transport import SingleReplica
from tests.integrations.launched import all_good, launched

TRAINER = ("transformers.trainer", "muonwire.integrations.transformers", "tests.integrations.tiny")
RECIPES = ("one_bit_muon(interval=2)", "muon", "distro")


def make(
    replicas, recipe, out, *, before=(), dataset=None, evaluated=None, unused=False, arguments=None, **options
):
    """A Trainer with the recipe, and its callback."""
    from transformers import Trainer, TrainingArguments

    from muonwire.integrations.transformers import MuonwireCallback
    from tests.integrations import tiny

    given = {
        "output_dir": str(out),
        "max_steps": tiny.STEPS,
        "learning_rate": tiny.RATE,
        "weight_decay": tiny.DECAY,
        "per_device_train_batch_size": tiny.BATCH,
        "gradient_accumulation_steps": tiny.ACCUMULATE,
        "save_steps": tiny.STOP,
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    wire = MuonwireCallback(recipe, replicas=replicas, **options)
    args = TrainingArguments(**given | (arguments or {}))
    model = tiny.llama()
    if unused:
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=replicas.shard(tiny.Tokens()) if dataset is None else dataset,
        eval_dataset=tiny.Tokens(1000, 8) if evaluated is None else evaluated,
        optimizer_cls_and_kwargs=wire.optimizer_cls_and_kwargs,
        callbacks=wire.callbacks(args, *before),
    )
    return trainer, wire, tiny.watched(model)


def stopper(at):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == at

    return Stop()


def at_event(event, when):
    """Wants to stop at another event, in a step."""
    from transformers import TrainerCallback

    def act(args, state, control, **_):
        control.should_training_stop |= state.global_step == when

    callback = TrainerCallback()
    setattr(callback, event, act)
    return callback


def listener():
    """What a callback of the user's reads in the metrics."""
    from transformers import TrainerCallback

    class Listen(TrainerCallback):
        def __init__(self):
            self.heard = []

        def on_evaluate(self, args, state, control, metrics, **_):
            self.heard.append(metrics["eval_loss"])

    return Listen()


def spoiler():
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if state.global_step == 1:
                model.model.norm.weight.grad.fill_(float("inf"))

    return Spoil()


def token_loss(model, batch, count):
    return model(**batch, num_items_in_batch=torch.tensor(count)).loss


def interrupted_and_resumed(out):
    """Each recipe on this replica: the Trainer stopped and resumed by its own means, and the plain loop."""
    from transformers.utils import logging

    from muonwire.integrations import join_replicas
    from tests.integrations import tiny

    logging.disable_progress_bar()
    joined = join_replicas()
    link, found = joined.transport, {}
    for recipe in RECIPES:
        place = f"{out}/{recipe}"
        # As in processes of their own, each training begins on connections that have carried nothing.
        replicas = Replicas(tiny.fresh(link))
        trainer, wire, first = make(replicas, recipe, place, before=[stopper(tiny.STOP)])
        trainer.train(resume_from_checkpoint=wire.newest_checkpoint())
        stopped = trainer.state.global_step
        replicas = Replicas(tiny.fresh(link))
        trainer, wire, second = make(replicas, recipe, place)
        checkpoint = wire.newest_checkpoint()
        trainer.train(resume_from_checkpoint=checkpoint)
        batches = [*first, *second]
        plain, _ = tiny.plain_loop(recipe, batches, [tiny.fresh(link)], loss=token_loss)
        again, sent = tiny.plain_loop(recipe, batches, [tiny.fresh(link), tiny.fresh(link)], loss=token_loss)
        found[recipe] = {
            "stopped": stopped,
            "checkpoint": checkpoint,
            "weights": tiny.weights(trainer.model),
            "plain": [plain, again],
            "sent": sent,
            "log": trainer.state.log_history,
            "num_batches": len(first) + len(second),
            "inputs": [b["input_ids"] for b in (*first, *second)],
            "world": (trainer.args.world_size, type(trainer.model_wrapped).__name__),
        }
    return found | {"refused": refused(joined, out)}


def refused(replicas, out):
    """What each error says, by what was done."""
    from tests.integrations import tiny

    said = {}

    def attempt(what, *, recipe="muon", resume=None, **given):
        try:
            trainer, _, _ = make(replicas, recipe, f"{out}/{what}", **given)
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"

    # What they evaluate before may differ.
    attempt(
        "same data",
        dataset=tiny.Tokens(),
        evaluated=tiny.Tokens(1000 + 100 * replicas.rank, 8),
        arguments={"eval_strategy": "steps", "eval_on_start": True},
    )
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    best |= {"metric_for_best_model": "loss"}
    attempt("best", arguments=best)
    attempt("another's checkpoint", resume=f"{out}/best/replica_0/checkpoint-1", arguments=best)
    said["fewer"] = fewer(f"{out}/best")
    attempt("one is kept", arguments={"save_total_limit": 1})
    attempt("look ahead", recipe="psyche")
    attempt("not finite", before=[spoiler()] if replicas.rank else [])
    attempt("batches found", arguments={"auto_find_batch_size": True})
    attempt("other lengths", arguments={"max_steps": 4 + replicas.rank})
    said["one stops"] = one_stops(replicas, out)
    said["one stops after an epoch"] = one_stops(
        replicas, out, at=("on_epoch_end", 1), dataset=replicas.shard(tiny.Tokens(length=16))
    )
    said["options"] = with_options(replicas, out)
    return said


def fewer(out):
    """A replica alone comes to what two have left."""
    trainer, wire, _ = make(Replicas(SingleReplica()), "muon", out)
    checkpoint = wire.newest_checkpoint()
    with pytest.raises(UsageError) as raised:
        trainer.train(resume_from_checkpoint=checkpoint)
    return str(raised.value)


def with_options(replicas, out):
    """Much that the Trainer offers at once; each replica evaluates on other data, and has a parameter that is never used."""
    from transformers import EarlyStoppingCallback

    from tests.integrations import tiny

    listening = listener()
    trainer, _, _ = make(
        replicas,
        "one_bit_muon(interval=2)",
        f"{out}/options",
        before=[listening, EarlyStoppingCallback(early_stopping_patience=2)],
        evaluated=tiny.Tokens(1000 + 100 * replicas.rank, 8),
        unused=True,
        arguments={
            "bf16": True,
            "activation_checkpointing": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
        },
    )
    trainer.train()
    state = trainer.state
    return {
        "step": state.global_step,
        "best": (state.best_global_step, state.best_metric, state.best_model_checkpoint),
        "heard": listening.heard,
        "own": [row["eval_loss"] for row in state.log_history if "eval_loss" in row],
        "weights": tiny.weights(trainer.model),
    }


def one_stops(replicas, out, *, at=("on_log", 2), dataset=None):
    """In which step a replica ends when replica 0 alone is told to stop at an event of a step; the losses evaluated."""
    from tests.integrations import tiny

    before = [at_event(*at)] if replicas.rank == 0 else []
    trainer, _, _ = make(
        replicas,
        "one_bit_muon(interval=4)",
        f"{out}/stop",
        before=before,
        dataset=dataset or replicas.shard(tiny.Stream()),
        arguments={"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 4},
    )
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return trainer.state.global_step, evaluated


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trainer"))
    return all_good(launched(interrupted_and_resumed, 2, folder, modules=TRAINER))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_training_is_our_own_loop_on_the_same_batches(replicas, recipe):
    for rank, found in enumerate(r[recipe] for r in replicas):
        assert found["stopped"] == 3
        assert found["num_batches"] == 12
        assert found["checkpoint"].endswith(f"replica_{rank}/checkpoint-3")
        assert found["world"] == (1, "LlamaForCausalLM")
        for plain in found["plain"]:
            for name, weight in plain.items():
                assert torch.equal(found["weights"][name], weight), name
    first, second = (r[recipe] for r in replicas)
    assert all(torch.equal(first["weights"][name], w) for name, w in second["weights"].items())
    # Every sample was seen once, by one replica.
    samples = torch.cat([*first["inputs"], *second["inputs"]])
    assert len(samples.unique(dim=0)) == len(samples) == 2 * 12 * 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_in_the_log_are_those_that_our_own_loop_sends(replicas, recipe):
    for found in (r[recipe] for r in replicas):
        last = found["log"][-1]
        num_parameters = sum(w.numel() for w in found["weights"].values())
        assert last["muonwire_sent_bytes"] == found["sent"] > 0
        assert last["muonwire_bits_per_parameter_step"] == 8 * found["sent"] / num_parameters / 6
        assert last["muonwire_wait_s"] > 0
        logged = [row for row in found["log"] if "loss" in row]
        assert [row["step"] for row in logged] == [2, 4, 6]
        assert all("muonwire_sent_bytes" in row for row in logged)


def test_what_cannot_hold_for_replicas_is_one_error_on_all_of_them(replicas):
    said = [r["refused"] for r in replicas]
    for of_one in said:
        assert of_one["same data"].startswith(
            "UsageError: replicas: processes 0 and 1 of 2 took their first step on the same"
        )
        assert of_one["look ahead"].startswith(
            "UsageError: MuonwireCallback: psyche trains at weights that differ"
        )
        assert "best" not in of_one
        assert "process 1 goes on from replica 0 of 2" in of_one["another's checkpoint"]
        assert "process 0 goes on from replica 0 of 2, of 1 replica(s) now" in of_one["fewer"]
        assert of_one["one is kept"].startswith("UsageError: MuonwireCallback: save_total_limit is 1; ")
        assert of_one["batches found"].startswith(
            "UsageError: MuonwireCallback: auto_find_batch_size is True"
        )
        assert of_one["not finite"].startswith("NonFiniteUpdateError: ")
        assert "step 2, rank" in of_one["not finite"]
        assert of_one["other lengths"].startswith(
            "ExchangeError: the plans of training of replica(s) 1 differ"
        )


@pytest.mark.parametrize("case", ["one stops", "one stops after an epoch"])
def test_a_replica_that_is_told_to_stop_stops_all_at_the_next_exchange(replicas, case):
    (step, losses), (same_step, same_losses) = (r["refused"][case] for r in replicas)
    assert step == same_step == 4
    assert len(losses) == 1
    assert losses == same_losses


def test_replicas_decide_alike_which_model_is_the_best(replicas):
    first, second = (r["refused"]["options"] for r in replicas)
    assert first["own"] != second["own"]
    means = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    for rank, found in enumerate((first, second)):
        step, metric, folder = found["best"]
        assert metric == min(means)
        assert step == 2 * (1 + means.index(metric))
        assert folder.endswith(f"replica_{rank}/checkpoint-{step}")
    assert first["heard"] == second["heard"] == means
    assert first["step"] == second["step"]
    assert all(torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())
    assert first["weights"]["unused"].tolist() == [1, 1, 1]


def with_several_processes(out):
    from muonwire.integrations import join_replicas
    from tests.integrations import tiny

    replicas = join_replicas(processes_per_replica=2)
    # One process of a replica, not its first, is told to stop, and the others with it after the next exchange.
    before = [at_event("on_log", 2)] if replicas.transport.everyone.rank == 3 else []
    trainer, _, seen = make(
        replicas, "one_bit_muon(interval=2)", out, before=before, arguments={"save_steps": 4}
    )
    trainer.train()
    saved = sorted(path.name for path in trainer_folder(trainer).iterdir())
    return {
        "world": (trainer.args.world_size, trainer.args.process_index, replicas.rank),
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": tiny.weights(trainer.model),
        "sent": replicas.transport.meter.training.sent_bytes,
        "inputs": torch.cat([b["input_ids"] for b in seen]),
        "saved": saved,
    }


def trainer_folder(trainer):
    from pathlib import Path

    return Path(trainer.args.output_dir)


def test_a_replica_of_several_processes_keeps_the_trainers_own_data_parallelism(tmp_path):
    results = all_good(launched(with_several_processes, 4, str(tmp_path), modules=TRAINER))
    assert [r["world"] for r in results] == [(2, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)]
    assert {r["wrapped"] for r in results} == {"DistributedDataParallel"}
    for r in results[1:]:
        assert all(torch.equal(w, results[0]["weights"][name]) for name, w in r["weights"].items())
    # Only what crosses between the replicas is counted, on their first processes.
    assert [r["sent"] > 0 for r in results] == [True, False, True, False]
    samples = torch.cat([r["inputs"] for r in results])
    assert len(samples.unique(dim=0)) == len(samples)
    assert all("checkpoint-4" in r["saved"] for r in results)


# One replica


@pytest.fixture
def alone():
    return Replicas(SingleReplica())


def test_reporters_see_the_bytes(alone, tmp_path):
    trainer, _, _ = make(
        alone, "muon", tmp_path, arguments={"max_steps": 2, "report_to": "tensorboard", "save_strategy": "no"}
    )
    trainer.train()
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents*"))
    assert b"train/muonwire_sent_bytes" in events
    # Another Trainer of the same arguments reports, too.
    assert trainer.args.report_to == ["tensorboard"]
    assert trainer.state.log_history[0]["muonwire_sent_bytes"] == 0
    group = trainer.optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0.02)


def test_options_that_the_arguments_give_are_refused(alone):
    from muonwire.integrations.transformers import MuonwireCallback

    with pytest.raises(UsageError, match="give learning_rate in TrainingArguments"):
        MuonwireCallback("muon", replicas=alone, lr=0.1)
    with pytest.raises(UsageError, match="weight_decay in TrainingArguments"):
        MuonwireCallback("muon(weight_decay=0.1)", replicas=alone)
    with pytest.raises(UsageError, match="'interval' is not an option"):
        MuonwireCallback("muon", replicas=alone, interval=3)
    assert MuonwireCallback(recipes.one_bit_muon, replicas=alone, interval=3).recipe.name == "one_bit_muon"


def test_half_of_the_pair_is_noticed(alone, tmp_path):
    from transformers import Trainer, TrainingArguments

    from muonwire.integrations.transformers import MuonwireCallback
    from tests.integrations import tiny

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    wire = MuonwireCallback("muon", replicas=alone)
    with pytest.raises(UsageError, match="the Trainer is not made yet"):
        wire.newest_checkpoint()
    trainer = Trainer(
        model=tiny.llama(),
        args=args,
        train_dataset=tiny.Tokens(),
        optimizer_cls_and_kwargs=wire.optimizer_cls_and_kwargs,
    )
    with pytest.raises(UsageError, match="give it the same object in callbacks"):
        trainer.train()
    wire = MuonwireCallback("muon", replicas=alone)
    trainer = Trainer(model=tiny.llama(), args=args, train_dataset=tiny.Tokens(), callbacks=[wire])
    with pytest.raises(UsageError, match="the Trainer has made an optimizer of its own"):
        trainer.train()


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_a_framework_that_is_not_there_is_one_clear_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"muonwire.integrations.{name}", raising=False)
    with pytest.raises(UsageError, match=rf'needs {name}.* pip install "muonwire\[integrations\]"'):
        importlib.import_module(f"muonwire.integrations.{name}")
