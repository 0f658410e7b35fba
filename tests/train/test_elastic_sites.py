"""`muonwire train --elastic` whose members are sites: processes of a launcher, their folder, a kill and a signal."""

import json
import os
import re
import signal
import socket
import subprocess

from muonwire.train import checkpoint
from muonwire.train.events import read_events
from tests.commands import Command, run
from tests.train.test_elastic import SIZES, wait_for

RECIPE = "one_bit_muon(interval=2)"
LONG = ("--min-replicas", "1", "--steps", "100000", "--checkpoint-every", "10", "--evaluate-every", "50")


def words(name, lighthouse, folder, *more):
    elastic = ("--elastic", "--lighthouse", lighthouse, "--name", name, "--timeout-s", "10")
    return ["train", "--recipe", RECIPE, *SIZES, *elastic, "--out", folder / name, *more]


def start(name, lighthouse, folder, *more):
    """The two replicas of a site, as torchrun starts them."""
    replicas = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = folder / f"{name}_{rank}.log"
        replicas.append(
            Command(words(name, lighthouse, folder, *more), env=env, stdout=log, stderr=subprocess.STDOUT)
        )
    return replicas


def digests(folder, name):
    return [json.loads(line) for line in (folder / name / "digests.jsonl").read_text().splitlines()]


def test_a_site_loses_a_replica_leaves_as_a_whole_and_comes_back(tmp_path, lighthouse):
    stays = start("stays", lighthouse, tmp_path, *LONG)
    goes = start("goes", lighthouse, tmp_path, *LONG)
    back = []
    try:
        wait_for(stays[0], tmp_path / "stays" / "status.json", '"goes": ')
        wait_for(goes[0], tmp_path / "goes" / "digests.jsonl", '"members": ."goes", "stays".')
        wait_for(goes[0], tmp_path / "goes" / "events.jsonl", '"checkpoint"')
        goes[1].kill()
        assert goes[0].wait(60) == 1
        said = (tmp_path / "goes_0.log").read_text()
        # In a checkpoint it is the replicas of the folder that talk, and no site.
        lost = r"error: replica 0 of (site goes lost replica 1 of its site|2 lost its connection to replica 1) in step \d+"
        assert re.search(lost, said), said
        assert read_events(tmp_path / "goes")[-1]["outcome"] == "failed"
        wait_for(stays[0], tmp_path / "stays" / "events.jsonl", r'"left": \["goes"\]')
        back = start("goes", lighthouse, tmp_path, *LONG, "--resume")
        wait_for(back[0], tmp_path / "goes_0.log", "took over the weights of step")
        wait_for(
            stays[0], tmp_path / "stays" / "events.jsonl", r'"left": \["goes"\](.*\n)*.*"joined": \["goes"\]'
        )
        # One of a site is asked, and all of it leaves with a checkpoint.
        back[1].send_signal(signal.SIGTERM)
        assert [replica.wait(60) for replica in back] == [143, 143]
        assert "goes left after step" in (tmp_path / "goes_0.log").read_text()
        # Not while it waits for those that have just left.
        wait_for(stays[0], tmp_path / "stays" / "events.jsonl", r'("left": \["goes"\](.*\n)*.*){2}')
        for replica in stays:
            replica.send_signal(signal.SIGTERM)
        assert [replica.wait(60) for replica in stays] == [143, 143]
    finally:
        for replica in (*stays, *goes, *back):
            replica.kill()
    for name in ("stays", "goes"):
        path = checkpoint.latest(tmp_path / name)
        assert {p.name for p in path.glob("rank_*.json")} == {"rank_0.json", "rank_1.json"}
        assert read_events(tmp_path / name)[-1]["outcome"] == "stopped"
    by_place = {}
    for line in digests(tmp_path, "stays") + digests(tmp_path, "goes"):
        if len(line["members"]) == 2:
            by_place.setdefault((line["commits"], line["step"]), set()).add(line["digest"])
    assert by_place
    assert all(len(found) == 1 for found in by_place.values())
    # Nothing was said twice.
    assert "took over" not in (tmp_path / "goes_1.log").read_text()


def test_replicas_that_the_command_starts_are_one_site(tmp_path, lighthouse):
    once = ("--min-replicas", "1", "--steps", "6", "--linger-s", "1", "--replicas", "2")
    done = run(words("a", lighthouse, tmp_path, *once))
    assert done.returncode == 0, done.stderr
    assert "a site of 2 replicas, their gradients averaged at every step" in done.stdout
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["replicas"], result["steps"], result["finished"]) == (2, 6, True)
    assert result["bytes_sent_per_step"] == 0
    assert result["bytes_inside_per_step"] > 4 * result["num_parameters"]
    again = run(words("a", lighthouse, tmp_path, *once))
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
