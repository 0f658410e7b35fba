"""`muonwire train --elastic`: what it refuses, and what a replica that leaves keeps. The faults are in tests/test_scripts.py."""

import fcntl
import json
import re
import signal
import subprocess
import threading
import time

import pytest

from muonwire.cli.main import main
from muonwire.errors import UsageError
from muonwire.train import TrainConfig
from muonwire.train.elastic import LOCK, ElasticTrainer, train_elastic
from muonwire.train.events import read_events
from muonwire.train.status import read_status
from muonwire.transport import SingleReplica, digest_all
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from tests.commands import Command
from tests.tiny_task import TINY, TinySettings, TinyTask

SIZES = [
    "--model-size",
    "pico",
    "--batch",
    "2",
    "--sequence",
    "16",
    "--threads",
    "1",
    "--no-page",
    "--no-tensorboard",
    *TINY,
]


def start(name, lighthouse, folder, *words):
    command = ["train", "--recipe", "one_bit_muon(interval=2)", *SIZES]
    elastic = [
        "--elastic",
        "--lighthouse",
        lighthouse,
        "--name",
        name,
        "--timeout-s",
        "10",
        "--out",
        folder / name,
    ]
    return Command([*command, *elastic, *words], stdout=folder / f"{name}.log", stderr=subprocess.STDOUT)


def wait_for(process, path, text):
    """Until a file of the running process has a text."""
    for _ in range(1200):
        if path.exists() and re.search(text, path.read_text()):
            return
        assert process.poll() is None, "it ended"
        time.sleep(0.05)
    raise AssertionError(f"{path} does not get {text}")


def test_one_leaves_on_a_signal_and_comes_back_while_the_other_goes_on(tmp_path, lighthouse):
    long = ("--min-replicas", "1", "--steps", "100000")
    stays = start("stays", lighthouse, tmp_path, *long)
    goes = start("goes", lighthouse, tmp_path, *long)
    try:
        wait_for(goes, tmp_path / "goes" / "status.json", '"synchronizations": [1-9]')
        # Both know each other.
        wait_for(stays, tmp_path / "stays" / "status.json", '"goes": ')
        goes.send_signal(signal.SIGTERM)
        assert goes.wait(60) != 0
        said = (tmp_path / "goes.log").read_text()
        assert "goes left after step" in said
        assert "--resume joins again" in said
        left_at = read_events(tmp_path / "goes")[-1]
        assert left_at["outcome"] == "stopped"
        wait_for(stays, tmp_path / "stays" / "events.jsonl", r'"left": \["goes"\]')
        back = start("goes", lighthouse, tmp_path, *long, "--resume")
        wait_for(back, tmp_path / "goes.log", "took over the weights of step")
        wait_for(
            stays, tmp_path / "stays" / "events.jsonl", r'"left": \["goes"\](.*\n)*.*"joined": \["goes"\]'
        )
        for process in (back, stays):
            process.send_signal(signal.SIGTERM)
        assert all(process.wait(60) != 0 for process in (back, stays))
    finally:
        for process in (stays, goes):
            process.kill()
    events = read_events(tmp_path / "stays")
    assert [e["joined"] for e in events if e["event"] == "members" and e["joined"]] == [["goes"], ["goes"]]
    status = read_status(tmp_path / "stays")
    assert status is not None
    # Both folders can be looked at by themselves.
    for name in ("stays", "goes"):
        lines = [json.loads(line) for line in (tmp_path / name / "digests.jsonl").read_text().splitlines()]
        assert all(line["members"] for line in lines)
    by_step = {}
    for name in ("stays", "goes"):
        for text in (tmp_path / name / "digests.jsonl").read_text().splitlines():
            line = json.loads(text)
            if len(line["members"]) == 2:
                by_step.setdefault((line["commits"], line["step"]), set()).add(line["digest"])
    assert by_step
    assert all(len(digests) == 1 for digests in by_step.values())


def test_one_that_is_stopped_while_it_waits_keeps_its_steps_and_goes_on(tmp_path, lighthouse):
    both = ("--min-replicas", "2", "--steps", "100000", "--checkpoint-every", "100000")
    members = {name: start(name, lighthouse, tmp_path, *both) for name in ("ada", "bob")}
    try:
        for name, member in members.items():
            wait_for(member, tmp_path / name / "status.json", '"synchronizations": [1-9]')
        members["bob"].send_signal(signal.SIGTERM)
        members["bob"].wait(60)
        # The other one steps on until it cannot synchronize alone.
        time.sleep(1)
        members["ada"].send_signal(signal.SIGTERM)
        assert members["ada"].wait(60) != 0
        assert "ada left after step" in (tmp_path / "ada.log").read_text()
        *_, kept, end = read_events(tmp_path / "ada")
        assert (kept["event"], end["outcome"]) == ("checkpoint", "stopped")
        assert kept["step"] == end["step"]
        members = {name: start(name, lighthouse, tmp_path, *both, "--resume") for name in members}
        for name, member in members.items():
            wait_for(member, tmp_path / name / "digests.jsonl", rf'"step": {kept["step"] + 4}\b')
    finally:
        for member in members.values():
            member.kill()


SMALL = TinySettings(sequence=8, batch=1, evaluation_sequences=2)


class GivenTask(TinyTask):
    """A part of the model is not trained, and comes from elsewhere."""

    entry = 0.0

    def build_model(self, *, seed):
        model = super().build_model(seed=seed)
        model.embed_tokens.weight.requires_grad_(False).fill_(self.entry)
        return model

    def carried(self, model):
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def member(name, folder, lighthouse, *, least, task=None):
    """In this process: three steps, of which the second and the last are followed by a synchronization."""
    how = ElasticSettings(lighthouse=lighthouse, name=name, min_replicas=least, timeout_s=10, linger_s=0.1)
    config = TrainConfig(
        recipe="one_bit_muon(interval=2)", steps=3, checkpoint_every=100, tensorboard=False, task=SMALL
    )
    trainer = ElasticTrainer(
        config, task or SMALL.make(), ElasticTransport(how), folder / name, home=SingleReplica(), device="cpu"
    )
    if (folder / name).joinpath("checkpoints").exists():
        assert trainer.resume()
    return trainer


def train_together(members, on_progress):
    """What becomes of each, by name."""
    results = {}

    def run(name, trainer):
        try:
            trainer.begin()
            results[name] = trainer.run(lambda progress: on_progress(name, trainer, progress.step))
            trainer.finish()
        except UsageError as error:
            results[name] = error
        trainer.transport.close()

    threads = [threading.Thread(target=run, args=item) for item in members.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_one_that_is_stopped_in_the_last_synchronization_goes_on_from_there(
    tmp_path, lighthouse, later_lighthouse
):
    def stop(name, trainer, step):
        transport, done = trainer.transport, trainer.transport.commits
        if step == 1 and name == "bob":
            # After the synchronization of step 2.
            transport.stopping = lambda: transport.commits > done
        if step == 2 and name == "ada":
            # While it waits for bob, who has left.
            transport.stopping = lambda: trainer.optimizer.num_steps == 3

    two = {name: member(name, tmp_path, lighthouse, least=2) for name in ("ada", "bob")}
    stopped = train_together(two, stop)
    assert {name: (r.steps, r.finished) for name, r in stopped.items()} == {
        "ada": (3, False),
        "bob": (2, False),
    }
    assert not (tmp_path / "ada/result.json").exists()
    ada = member("ada", tmp_path, later_lighthouse, least=1)
    assert (ada.step, ada.optimizer.steps_alone) == (3, 1)
    before = digest_all(ada.optimizer.shared())
    (result,) = train_together({"ada": ada}, lambda *_: None).values()
    assert (result.steps, result.finished) == (3, True)
    # What it had trained alone is in the shared weights now, and in its checkpoint.
    assert digest_all(ada.optimizer.shared()) != before
    assert member("ada", tmp_path, later_lighthouse, least=1).complete


def test_members_with_another_base_of_their_adapters_are_strangers(tmp_path, lighthouse):
    members = {}
    for name, entry in (("ada", 0.0), ("bob", 1.0)):
        task = GivenTask(SMALL)
        task.entry = entry
        members[name] = member(name, tmp_path, lighthouse, least=1, task=task)
    results = train_together(members, lambda *_: None)
    assert isinstance(results["bob"], UsageError)
    assert "bob trains something else" in str(results["bob"])
    assert results["ada"].finished


def test_a_folder_has_one_replica(tmp_path):
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another replica trains in"):
            train_elastic(TrainConfig(), tmp_path, ElasticSettings(lighthouse="127.0.0.1:1"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--elastic"], "give HOST:PORT"),
        (["--lighthouse", "127.0.0.1:1"], "add --elastic"),
        (["--elastic", "--lighthouse", "127.0.0.1:1", "--timeout-s", "0"], "timeout_s is 0"),
    ],
)
def test_bad_options_are_one_error(words, error, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, *SIZES, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert error in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
