"""Transports between some of the replicas, and the sites that they make."""

import os
from datetime import timedelta

import torch.distributed as dist

from muonwire.errors import UsageError
from muonwire.transport.base import Transport
from muonwire.transport.digest import check_agreement
from muonwire.transport.frames import FrameTransport
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.sites import Alone, SiteTransport
from muonwire.transport.threads import ThreadTransport

# The replicas of a site wait so much longer for their leader than leaders wait for each other, so that it can tell them of whom it lost.
LONGER_S = 30.0


def site_transport(
    everyone: Transport | None = None,
    *,
    sites: int | None = None,
    replicas_per_site: int | None = None,
    averages: bool = True,
) -> SiteTransport:
    """Let replicas act as sites: those of a site average their gradients at every step and exchange as one with the other sites.

    Replicas of a site have ranks that follow one another, as torchrun numbers the processes of a machine. All replicas call it together.

    Args:
        everyone: between all replicas: a ProcessGroupTransport, or what ``run_threads`` gives. Default: the process group of all.
        sites: how many there are.
        replicas_per_site: how many replicas a site has, instead of ``sites``. Default: torchrun's LOCAL_WORLD_SIZE, so that a site is
            a machine.
        averages: whether the optimizer averages the gradients of a site; False where the loop does, as with
            DistributedDataParallel over ``transport.inside.group``. Default: True.

    Inside a site messages travel as the given process group carries them, with nccl where it has that. Between sites it is gloo.

    Raises:
        UsageError: the replicas cannot be divided so, there would be one site, or the transport has no such parts.
        ExchangeError: the replicas do not give the same.

    >>> from muonwire.transport import run_threads
    >>> def worker(rank, make):
    ...     transport = site_transport(make(), sites=2)
    ...     return transport.rank, transport.gather(b"site %d" % transport.rank)
    >>> run_threads(worker, replicas=4)[3]
    (1, [b'site 0', b'site 1'])
    """
    everyone = ProcessGroupTransport() if everyone is None else everyone
    inside = _replicas_inside(everyone.world_size, sites, replicas_per_site)
    check_agreement(f"{inside} replicas a site, averages={averages}", everyone, what="sites")
    ranks = [list(range(first, first + inside)) for first in range(0, everyone.world_size, inside)]
    own = ranks[everyone.rank // inside]
    leaders = [of_site[0] for of_site in ranks]
    home = _among(everyone, own, fast=True) if inside > 1 else Alone()
    between = _among(everyone, leaders, fast=False) if everyone.rank in leaders else None
    made = SiteTransport(everyone, home, between, ranks=ranks, averages=averages)
    made.waits.limit_s = everyone.waits.limit_s
    everyone.waits = made.waits
    return made


def check_sites(replicas: int, sites: int) -> None:
    """Raise UsageError where so many replicas do not make so many sites."""
    _replicas_inside(replicas, sites, None)


def _replicas_inside(replicas: int, sites: int | None, given: int | None) -> int:
    """How many replicas a site has."""
    if sites is not None and given is not None:
        raise UsageError(
            f"sites: there are {sites} sites and {given} replicas a site; give one of the two numbers"
        )
    if sites is not None:
        if sites < 2 or replicas % sites:
            raise UsageError(
                f"sites: {replicas} replicas in {sites} site(s); give a number of at least 2 that divides the replicas, so that all "
                "sites have as many, or leave it out: then every replica is by itself"
            )
        return replicas // sites
    if given is None:
        text = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not text.isdecimal():
            raise UsageError(
                "sites: how many replicas a site has is not known, since no launcher has set LOCAL_WORLD_SIZE; give sites or "
                "replicas_per_site"
            )
        given = int(text)
    if given < 1 or replicas % given or replicas == given:
        raise UsageError(
            f"sites: {replicas} replicas with {given} a site; give a number that divides the replicas into at least 2 sites of as "
            "many each"
        )
    return given


def _among(whole: Transport, ranks: list[int], *, fast: bool) -> FrameTransport:
    """A transport between some of the replicas of ``whole``, which call it together; ``fast``: as that one travels."""
    if isinstance(whole, ThreadTransport):
        return whole.among(ranks)
    if not isinstance(whole, ProcessGroupTransport):
        raise UsageError(
            f"sites: {type(whole).__name__} cannot be divided; give a ProcessGroupTransport, or what run_threads gives, of at least "
            "2 replicas (replicas that come and go cannot be sites)"
        )
    links = whole._links
    limit = timedelta(seconds=whole._timeout_s)
    if whole.device.type == "cpu" and links is None:
        limit = whole._group._get_backend(whole.device).options._timeout
    limit_s = limit.total_seconds() + (LONGER_S if fast else 0.0)
    of_group = dist.get_process_group_ranks(whole._group)
    nccl = dist.get_backend(whole.group) == "nccl"
    try:
        group = dist.new_group(
            [of_group[rank] for rank in ranks],
            backend="nccl" if fast and nccl else "gloo",
            timeout=timedelta(seconds=limit_s),
            use_local_synchronization=True,
        )
    except RuntimeError as error:
        raise whole._lost(None, error) from error
    return ProcessGroupTransport(
        group,
        device=whole.device if fast else "cpu",
        secret=None if links is None else links.secret,
        run="" if links is None else f"{links.run}/replicas {ranks}",
        timeout_s=limit_s,
    )
