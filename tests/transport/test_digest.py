"""The digest of weights, and its comparison between replicas."""

import pytest
import torch
from torch import nn

from muonwire.errors import DivergedReplicasError, UsageError
from muonwire.transport import SingleReplica, check_replicas, digest, digest_all, run_threads
from tests.replicas import run_replicas


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.bn = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool), persistent=False)
        self.tied = self.linear.weight


def _model():
    torch.manual_seed(0)
    return _Model()


def _compare(transport, change, last_only=True):
    model = _model()
    if transport.rank == transport.world_size - 1 or not last_only:
        with torch.no_grad():
            change(model)
    try:
        return check_replicas(model, transport)
    except DivergedReplicasError as error:
        return str(error)


CHANGES = {
    "parameter 'linear.bias'": lambda m: m.linear.bias[0].add_(1),
    "buffer 'bn.running_mean'": lambda m: m.bn.running_mean[1].sub_(1e-3),
    "buffer 'bn.num_batches_tracked'": lambda m: m.bn.num_batches_tracked.add_(1),
    "buffer 'mask'": lambda m: m.mask[3].fill_(True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_tensor_of_a_model_that_differs_is_named(name):
    texts = run_threads(lambda _, make: _compare(make(), CHANGES[name]), replicas=3)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"replicas diverged: {name} is the first of 8 that differs; on rank(s) 2 its")


def test_models_that_agree_have_the_digest_of_their_tensors():
    seen = run_threads(lambda _, make: _compare(make(), lambda m: None), replicas=2)
    model = _model()
    assert set(seen) == {digest_all(model).hex()}
    assert digest_all(model) == digest_all([*model.named_parameters(), *model.named_buffers()])
    assert digest_all(iter(model.named_parameters())) != digest_all(model)


def _renamed(model):
    model.norm = model.bn
    del model.bn


def _reshaped(model):
    model.linear.weight.data = model.linear.weight.data.view(3, 2)


def _smaller(model):
    del model.mask


SHAPES = {
    "names": (_renamed, "differ in the names, dtypes or shapes of their tensors: number 3 of 8"),
    "shapes": (_reshaped, "differ in the names, dtypes or shapes of their tensors: number 1 of 8"),
    "number": (_smaller, "number of their tensors: replica 0 has 8, replica 1 has 8, replica 2 has 7"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_replicas_with_other_tensors_raise_on_all_ranks(case):
    change, says = SHAPES[case]
    for text in run_threads(lambda _, make: _compare(make(), change), replicas=3):
        assert says in text


def _in_a_process(case):
    from muonwire.transport import ProcessGroupTransport

    return _compare(ProcessGroupTransport(), SHAPES[case][0])


def test_and_so_are_processes():
    for text in run_replicas(_in_a_process, 2, "number"):
        assert "replica 0 has 8, replica 1 has 7" in text


TENSORS = {
    "zero-size": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
    "bfloat16": torch.arange(6).to(torch.bfloat16),
    "float8": torch.arange(6).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j, 3j]).conj(),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "strided": torch.arange(12, dtype=torch.float64)[::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "parameter": nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_every_kind_have_a_digest_of_their_values(kind):
    tensor = TENSORS[kind]
    assert len(digest(tensor)) == 8
    assert digest(tensor) == digest(tensor.detach().clone(memory_format=torch.contiguous_format))
    assert len(check_replicas([(kind, tensor)], SingleReplica())) == 16


def _distributed_tensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    try:
        return digest_all([("w", tensor)])
    except UsageError as error:
        return str(error)


def test_tensors_without_data_here_are_refused_by_name():
    with pytest.raises(UsageError, match="'w' is on the meta device"):
        check_replicas([("w", torch.empty(2, device="meta"))], SingleReplica())
    with pytest.raises(UsageError, match=r"the tensor is sparse_coo.*to_dense"):
        digest(torch.eye(2).to_sparse())
    (text,) = run_replicas(_distributed_tensor, 1)
    assert "parameter 'w' is a DTensor" in text
    assert "full_tensor()" in text
