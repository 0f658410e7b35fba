"""Several replicas of a stage in one process: their requests answered as an exchange would."""

import torch

from muonwire.stages import Context, MatrixLayout, Reply
from muonwire.transport import SingleReplica


def context(updates, *, lr=0.1, step=1):
    layouts = [MatrixLayout() for _ in updates]
    return Context(lr=lr, step=step, transport=SingleReplica(), layouts=layouts)


def run_lockstep(stage, updates_by_replica, params, states_by_replica, *, step=1, lr=0.1):
    """What the stage returns on each replica, and the requests of each round (by replica)."""
    running = [
        stage.rounds(updates, params, states, context(updates, step=step, lr=lr))
        for updates, states in zip(updates_by_replica, states_by_replica, strict=True)
    ]
    rounds, replies = [], [None] * len(running)
    while True:
        requests, results = [], []
        for generator, reply in zip(running, replies, strict=True):
            try:
                requests.append(next(generator) if reply is None else generator.send(reply))
            except StopIteration as end:
                results.append(end.value)
        if results:
            assert not requests, "the replicas take different numbers of rounds"
            return results, rounds
        rounds.append(requests)
        if requests[0].tensors is None:
            reply = Reply(payloads=[r.payload for r in requests])
        else:
            columns = zip(*(r.tensors for r in requests), strict=True)
            reply = Reply(
                tensors=[torch.stack([t.float() for t in c]).mean(0).to(c[0].dtype) for c in columns]
            )
        replies = [reply] * len(running)
