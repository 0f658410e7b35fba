"""What is divided among replicas: processes, data, folders, checkpoints."""

import os
from itertools import chain

import pytest
import torch

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.integrations import Replicas, Shard, StreamShard, join_replicas
from muonwire.integrations.replicas import _see_one_gpu
from muonwire.integrations.shards import SameData
from muonwire.transport import SingleReplica, run_threads
from muonwire.transport.secret import write_secret
from tests.integrations.launched import all_good, launched

SEEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def joined(processes, secret=None):
    import torch.distributed as dist

    try:
        replicas = join_replicas(processes_per_replica=processes, secret_file=secret)
    except UsageError as error:
        return str(error)
    transport = replicas.transport
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
    told = transport.gather(b"replica %d" % replicas.rank)
    # A channel has connections of its own, too.
    channel = transport.channel().transport
    told += channel.gather(b"beside %d" % replicas.rank)
    mean = transport.mean([torch.tensor([float(replicas.rank)])])[0].item()
    everyone = transport.everyone.gather(b"%d" % transport.everyone.rank)
    replicas.close()
    # The launcher's variables are gone, and it joins none anew.
    assert join_replicas(processes_per_replica=processes) is replicas
    with pytest.raises(UsageError, match=f"joined with {processes} before"):
        join_replicas(processes_per_replica=4)
    return {
        "replica": (replicas.rank, replicas.world_size, replicas.num_inside),
        "group": group,
        "seen": [os.environ.get(key) for key in SEEN],
        "told": told,
        "mean": mean,
        "everyone": everyone,
        "sealed": getattr(transport, "_links", None) is not None,
    }


@pytest.mark.parametrize("sealed", [False, True])
def test_a_framework_sees_a_replica_of_one_process_without_a_launcher(sealed, tmp_path):
    secret = tmp_path / "secret" if sealed else None
    if sealed:
        write_secret(secret)
    for rank, found in enumerate(all_good(launched(joined, 2, 1, secret))):
        assert found["sealed"] == sealed
        assert found["replica"] == (rank, 2, 1)
        assert found["group"] is None
        assert found["seen"] == [None] * 4
        assert found["told"] == [b"replica 0", b"replica 1", b"beside 0", b"beside 1"]
        assert found["mean"] == 0.5


def test_a_framework_sees_the_processes_of_its_replica_alone():
    for rank, found in enumerate(all_good(launched(joined, 4, 2))):
        assert found["replica"] == (rank // 2, 2, 2)
        assert found["group"] == (rank % 2, 2)
        assert found["seen"] == [str(rank % 2), "2", str(rank), "2"]
        assert found["told"] == [b"replica 0", b"replica 1", b"beside 0", b"beside 1"]
        assert found["everyone"] == [b"0", b"1", b"2", b"3"]


def left_alone():
    transport = join_replicas().transport
    transport.gather(b"")
    if transport.rank == 1:
        os._exit(1)
    with pytest.raises(ReplicaLostError) as raised:
        transport.gather(b"")
    return raised.value.rank, str(raised.value)


def test_a_replica_that_is_gone_is_named():
    (rank, said), gone = launched(left_alone, 2)
    assert gone is None
    assert rank == 1
    assert said.startswith("replica 0 of 2 lost its connection to replica 1 in step 0")


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("3,5", "5"), ("7", "7")])
def test_a_replica_of_one_process_sees_one_gpu(visible, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _see_one_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="uses a GPU already"):
        _see_one_gpu(1)


def test_processes_that_cannot_be_divided_are_an_error_on_all():
    for said in launched(joined, 2, 3):
        assert "2 process(es) with 3 a replica" in said


def test_without_a_launcher_there_is_one_replica(monkeypatch):
    for key in (*SEEN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    replicas = join_replicas()
    assert (replicas.rank, replicas.world_size) == (0, 1)
    assert replicas.shard("abc") == "abc"
    assert str(replicas.folder("runs/a")) == "runs/a"


def test_a_launcher_that_leaves_out_a_variable_is_not_taken_for_none(monkeypatch):
    for key in (*SEEN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"):
        join_replicas()


def test_a_process_group_that_is_there_already_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        UsageError, match=r"initialized already, with 2 process.* call join_replicas.. once, before"
    ):
        join_replicas()


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("length", [7, 20, 21])
def test_shards_are_of_one_length_and_share_no_sample(length, world_size):
    for kind in (Shard, StreamShard):
        shards = [list(kind(range(length), rank=r, world_size=world_size)) for r in range(world_size)]
        assert {len(s) for s in shards} == {length // world_size}
        assert sorted(chain.from_iterable(shards)) == list(range(length // world_size * world_size))


def test_a_shard_is_indexed_as_a_list():
    shard = Shard("abcdefgh", rank=1, world_size=2)
    assert (shard[0], shard[3], shard[-1]) == ("b", "h", "h")
    for index in (4, -5):
        with pytest.raises(IndexError):
            shard[index]
    with pytest.raises(UsageError, match=r"1 sample\(s\) for 2 replicas"):
        Shard("a", rank=0, world_size=2)


class Two(SingleReplica):
    """Replica 1 of two, with nobody to talk to."""

    def __init__(self):
        super().__init__()
        self.rank, self.world_size = 1, 2


class Letters(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter("abcde")

    def __len__(self):
        return 5


def test_a_dataset_of_the_datasets_library_stays_one():
    import datasets

    whole = datasets.Dataset.from_dict({"text": list("abcde")})
    shard = Replicas(Two()).shard(whole)
    assert isinstance(shard, datasets.Dataset)
    assert shard["text"][:] == ["b", "d"]
    stream = Replicas(Two()).shard(whole.to_iterable_dataset())
    assert [row["text"] for row in stream] == ["b", "d"]
    sized = Replicas(Two()).shard(torch.utils.data.ChainDataset([Letters()]))
    assert list(sized) == ["b", "d"]
    with pytest.raises(UsageError, match="DatasetDict holds train, test; give one of these"):
        Replicas(Two()).shard(datasets.DatasetDict({"train": whole, "test": whole}))
    with pytest.raises(UsageError, match="int has neither an index nor an iterator"):
        Replicas(Two()).shard(3)


def test_a_replica_has_a_folder_of_its_own():
    folder = Replicas(Two()).folder("runs/a")
    assert str(folder) == "runs/a/replica_1"
    assert Replicas(Two()).folder(folder) == folder


def test_the_newest_checkpoint_is_one_that_all_have():
    def worker(rank, make):
        replicas = Replicas(make())
        return [replicas.newest_in_all(s) for s in ([4, 8, 12][: 3 - rank], [] if rank else [4])]

    assert run_threads(worker, replicas=2) == [[8, None], [8, None]]


@pytest.mark.parametrize("steps", [([8], [4]), ([4, 8], [])])
def test_a_run_whose_checkpoints_do_not_meet_does_not_begin_anew(steps):
    def worker(rank, make):
        with pytest.raises(UsageError) as raised:
            Replicas(make()).newest_in_all(steps[rank])
        return str(raised.value)

    for said in run_threads(worker, replicas=2):
        assert "no checkpoint that all have" in said
        assert f"process 0: {', '.join(map(str, steps[0]))}; process 1: " in said


def test_only_what_replicas_train_on_is_compared():
    def worker(rank, make):
        data = [SameData(make()) for _ in range(3)]
        # A model that no tensor goes into, in the first; evaluated on other data, in the second.
        data[0].check()
        with torch.no_grad():
            data[1].see(torch.tensor(rank))
        for its in data[1:]:
            its.see(torch.tensor(7) if its is data[1] else torch.tensor(rank))
        data[2].check()
        with pytest.raises(UsageError, match="processes 0 and 1 of 2 took their first step on the same"):
            data[1].check()

    run_threads(worker, replicas=2)
