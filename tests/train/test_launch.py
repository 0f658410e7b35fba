import pytest
import torch

from muonwire.train import launch


class _JoinedError(Exception):
    pass


@pytest.fixture
def joined(monkeypatch):
    """What ``process_group`` has asked for when it would join: the backends, and the GPUs that were made current."""
    asked = {"backends": [], "gpus": []}

    def join(*, backend, **_):
        asked["backends"].append(backend)
        raise _JoinedError

    monkeypatch.setattr(launch, "join", join)
    monkeypatch.setattr(launch, "under_launcher", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked["gpus"].append)
    monkeypatch.delenv("MUONWIRE_SECRET_FILE", raising=False)
    return asked


@pytest.mark.parametrize(("local_rank", "gpu"), [(0, 0), (1, 1), (5, 1)])
def test_processes_beyond_the_gpus_share_them(joined, monkeypatch, local_rank, gpu):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(_JoinedError), launch.process_group():
        pass
    assert joined["gpus"] == [gpu]


@pytest.mark.parametrize(
    ("inside", "sealed", "backend"),
    [(False, False, "gloo"), (True, False, "nccl"), (True, True, "gloo")],
    ids=["between replicas", "inside a site", "inside a sealed one"],
)
def test_nccl_is_asked_for_inside_only(joined, tmp_path, inside, sealed, backend):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(33, 97)))
    secret.chmod(0o600)
    with (
        pytest.raises(_JoinedError),
        launch.process_group(inside=inside, secret_file=secret if sealed else None),
    ):
        pass
    assert joined["backends"] == [backend]
