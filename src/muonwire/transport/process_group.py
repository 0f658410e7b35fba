"""Transport over a torch.distributed process group."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.transport.frames import FrameTransport


class ProcessGroupTransport(FrameTransport):
    """Transport between the replicas of a process group.

    Args:
        group: the process group; default: the world. ``torch.distributed`` must be initialized.
        device: where messages are kept while they travel. Default: the CPU for gloo, the current GPU for nccl.

    Raises:
        UsageError: ``torch.distributed`` is not initialized.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, device: torch.device | str | None = None
    ) -> None:
        if not dist.is_initialized():
            raise UsageError(
                "ProcessGroupTransport: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first, or use SingleReplica for one replica"
            )
        self.group = group
        on_gpu = dist.get_backend(group) == "nccl"
        super().__init__(
            rank=dist.get_rank(group),
            world_size=dist.get_world_size(group),
            device=torch.device(device) if device else torch.device("cuda" if on_gpu else "cpu"),
        )

    def carry(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """See FrameTransport.carry."""
        ops, peers = [], []
        for operation, messages in ((dist.irecv, incoming), (dist.isend, outgoing)):
            for peer, message in messages.items():
                ops.append(dist.P2POp(operation, message, group=self.group, group_peer=peer))
                peers.append(peer)
        rank: int | None = None
        try:
            works = dist.batch_isend_irecv(ops)
            for i, work in enumerate(works):
                # nccl answers with one work for the whole batch, which cannot say whose message failed.
                rank = peers[i] if len(works) == len(ops) else None
                work.wait()
        except RuntimeError as error:
            who = "a replica" if rank is None else f"replica {rank}"
            raise ReplicaLostError(
                f"replica {self.rank} lost its connection to {who} (of {self.world_size}) in operation {self._sequence}: "
                f"{str(error).splitlines()[0][:200]}",
                rank=rank,
            ) from error
