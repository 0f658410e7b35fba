"""Replicas that take their local steps together do to the last bit what replicas that take turns do."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from muonwire.compare import together
from muonwire.compare.together import TogetherTrainer
from muonwire.optim.stack import VECTOR
from muonwire.train.config import TrainConfig
from muonwire.train.loop import Trainer
from muonwire.train.metrics import read_metrics
from muonwire.transport import ProcessGroupTransport, run_threads
from tests.replicas import run_replicas
from tests.tiny_task import TinySettings, TinyTask

REPLICAS = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(recipe, **options):
    task = TinySettings(batch=2, sequence=16, evaluation_sequences=4)
    given = {
        "steps": 17,
        "evaluate_every": 7,
        "checkpoint_every": 10,
        "digest_every": 9,
        "tensorboard": False,
    }
    return TrainConfig(recipe=recipe, task=task, lr=0.02, **{**given, **options})


def trained(folder, config, make, *, task=None, stop_at=None):
    """What the replicas came to, in rank order, and the metrics of the first; ``stop_at`` asks them to stop after a step."""
    task = task or config.task.make()

    def replica(rank, make_transport):
        trainer = make(config, task, make_transport(), folder, device="cpu")
        trainer.resume()

        def stop(progress):
            if progress.step == stop_at:
                trainer.request_stop()

        result = trainer.run(stop)
        return (
            result.weights_digest,
            result.final_eval_loss,
            result.steps,
            result.diverged,
            result.diagnostics,
        )

    results = run_threads(replica, replicas=REPLICAS)
    kept = ("step", "local_loss", "train_loss", "eval_loss", "lr", "sent_bytes")
    return results, [{key: line.get(key) for key in kept} for line in read_metrics(folder)]


@pytest.fixture
def taken(monkeypatch):
    """How many steps were taken together, meeting by meeting."""
    numbers, take = [], together.take

    def counted(trainers, number):
        take(trainers, number)
        numbers.append(len(trainers[0]._taken))

    monkeypatch.setattr(together, "take", counted)
    return numbers


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # Steps 1 (the first of the process), 5, 7, 9, 10, 14, 15 and 17 are taken as ever.
        ("one_bit_muon(interval=5)", [3, 3]),
        ("sparseloco(interval=4, codec='sign')", [2, 2]),
        ("one_bit_muon(interval=3, growth=0.5)", None),
    ],
)
def test_the_same_bits(tmp_path, recipe, expected, taken):
    config = config_of(recipe)
    plain = trained(tmp_path / "plain", config, Trainer)
    assert not taken
    # Biases of 32 entries are not moved together, tensors of whole vectors are.
    sizes = {p.numel() % VECTOR for p in config.task.make().build_model(seed=0).parameters()}
    assert sizes == {0, 32}
    assert trained(tmp_path / "together", config, TogetherTrainer) == plain
    assert taken
    assert expected is None or taken == expected


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, taken):
    config = config_of("one_bit_muon(interval=4)", digest_every=0, evaluate_every=17)
    for make in (Trainer, TogetherTrainer):
        stopped, _ = trained(tmp_path / make.__name__, config, make, stop_at=7)
        # The exchange of step 8 tells the others.
        assert [result[2] for result in stopped] == [8] * REPLICAS
    before = len(taken)
    made, plain = (trained(tmp_path / make.__name__, config, make) for make in (TogetherTrainer, Trainer))
    assert made == plain
    assert 0 < before < len(taken)


def test_a_run_that_diverges_ends_in_the_same_step(tmp_path, taken):
    class Breaks(TinyTask):
        breaks = False

        def batch(self, *, seed, step, rank, world_size):
            self.breaks = (step, rank) == (7, 1)
            return super().batch(seed=seed, step=step, rank=rank, world_size=world_size)

        def loss(self, model, batch):
            return super().loss(model, batch) * (float("nan") if self.breaks else 1.0)

    config = config_of("one_bit_muon(interval=5)", evaluate_every=17)
    task = Breaks(config.task)
    with pytest.warns(UserWarning, match="this replica leaves step"):
        plain = trained(tmp_path / "plain", config, Trainer, task=task)
    with pytest.warns(UserWarning, match="this replica leaves step"):
        made = trained(tmp_path / "together", config, TogetherTrainer, task=task)
    assert [result[1:4] for result in plain[0]] == [(None, 9, True)] * REPLICAS
    assert str(made) == str(plain)
    assert taken[0] == 3


class Drops(TinyTask):
    """Its model draws from torch's generator, as it comes."""

    def build_model(self, *, seed):
        model = super().build_model(seed=seed)
        model.layers[0] = nn.Sequential(model.layers[0], nn.Dropout(0.5))
        return model


def in_a_process(config, folder):
    return (
        Trainer(config, Drops(config.task), ProcessGroupTransport(), folder, device="cpu")
        .run()
        .weights_digest
    )


@pytest.mark.parametrize("recipe", ["muon", "one_bit_muon(interval=5)"])
def test_what_replicas_draw_at_random_is_what_they_draw_in_processes_of_their_own(tmp_path, recipe):
    config = config_of(recipe, checkpoint_every=4)
    expected = run_replicas(in_a_process, REPLICAS, config, tmp_path / "processes")
    drops = Drops(config.task)
    whole, _ = trained(tmp_path / "whole", config, TogetherTrainer, task=drops)
    assert [result[0] for result in whole] == expected
    # Somebody else draws in between.
    assert trained(tmp_path / "cut", config, TogetherTrainer, task=drops, stop_at=6)[0][0][2] < config.steps
    torch.manual_seed(999)
    resumed, _ = trained(tmp_path / "cut", config, TogetherTrainer, task=drops)
    assert [result[0] for result in resumed] == expected


def test_models_that_draw_random_numbers_and_recipes_that_exchange_in_every_step_take_turns(tmp_path, taken):
    config = config_of("one_bit_muon(interval=5)")
    drops = Drops(config.task)
    assert trained(tmp_path / "drops", config, TogetherTrainer, task=drops)[0][0][2] == 17
    dense = config_of("muon")
    assert trained(tmp_path / "dense", dense, TogetherTrainer)[0][0][2] == 17
    assert taken == []


COUNT_HEAPS = """
import ctypes, threading
from muonwire.compare.virtual import _share
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stdout = ctypes.c_void_p(libc.fdopen(1, b"w"))
def use_threads():
    meet = threading.Barrier(16)
    def use():
        meet.wait()
        held = [bytearray(50_000) for _ in range(100)]
        meet.wait()
    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc.malloc_info(0, stdout)
_share([])
libc.malloc_info(0, stdout)
use_threads()
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no heaps of threads")
def test_replicas_that_are_threads_get_no_heaps_of_their_own():
    """So that memory does not grow by what each of them has ever needed at once."""
    run = subprocess.run([sys.executable, "-c", COUNT_HEAPS], capture_output=True, check=True, text=True)
    before, after = (part.count("<heap nr=") for part in run.stdout.split("</malloc>")[:2])
    assert before == after > 0
