"""Transports between some of the replicas, and the sites that they make."""

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from muonwire.errors import UsageError
from muonwire.transport.base import Transport
from muonwire.transport.digest import check_agreement
from muonwire.transport.frames import FrameTransport
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.sites import Alone, SiteTransport
from muonwire.transport.threads import ThreadTransport

# Replicas of a site wait as long for each other as the process group does, leaders so much longer for each other, and a site twice
# that for what its leader got: so whoever stands still is named by those that know it, and they can tell the others.
LONGER_S = 15.0


def site_transport(
    everyone: Transport | None = None,
    *,
    sites: int | None = None,
    replicas_per_site: int | None = None,
    averages: bool = True,
) -> SiteTransport:
    """Let replicas act as sites: those of a site average their gradients at every step and exchange as one with other sites.

    Replicas of a site have ranks that follow one another, as torchrun numbers the processes of a machine. All replicas call it
    together.

    Args:
        everyone: between all replicas: a ProcessGroupTransport, or what ``run_threads`` gives. Default: the process group of all.
        sites: how many there are.
        replicas_per_site: how many replicas a site has, instead of ``sites``. Default: torchrun's LOCAL_WORLD_SIZE, so that a
            site is a machine.
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
    _check_divisible(everyone)
    inside = _replicas_inside(everyone.world_size, sites, replicas_per_site)
    check_agreement(f"{inside} replicas a site, averages={averages}", everyone, what="sites")
    ranks = [list(range(first, first + inside)) for first in range(0, everyone.world_size, inside)]
    parts = partial(_parts, everyone, ranks)
    home, between = parts()
    again = None if isinstance(everyone, ThreadTransport) else parts
    made = SiteTransport(everyone, home, between, ranks=ranks, averages=averages, again=again)
    made.waits.limit_s = everyone.waits.limit_s
    everyone.waits, everyone.members = (
        made.waits,
        tuple(made.members[rank // inside] for rank in range(everyone.world_size)),
    )
    return made


def _check_divisible(whole: Transport) -> None:
    # One of replicas that come and go is a ProcessGroupTransport, too.
    if isinstance(whole, ThreadTransport) or (
        type(whole) is ProcessGroupTransport and whole.world_size == dist.get_world_size()
    ):
        return
    raise UsageError(
        f"sites: {type(whole).__name__} of {whole.world_size} replica(s) cannot be divided; give a ProcessGroupTransport of the "
        "default process group, or what run_threads gives (for replicas that come and go see ElasticSiteTransport)"
    )


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
                f"sites: {replicas} replica(s) in {sites} site(s); give a number of at least 2 that divides the replicas, so that "
                "all sites have as many, or leave it out: then every replica is by itself"
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


def _parts(
    whole: Transport, ranks: Sequence[Sequence[int]], *, channel: int = 0
) -> tuple[FrameTransport, FrameTransport | None]:
    """This replica's way inside its site, and that between the leaders if it is one; all replicas call it together.

    Args:
        whole: between all replicas.
        ranks: by site.
        channel: number of a further pair, whose messages a thread of its own carries. 0: the first pair.
    """
    leaders = [of_site[0] for of_site in ranks]
    if isinstance(whole, ThreadTransport):
        own = next(of_site for of_site in ranks if whole.rank in of_site)
        home = whole.among(own) if len(own) > 1 else Alone()
        return home, whole.among(leaders) if whole.rank in leaders else None
    assert isinstance(whole, ProcessGroupTransport)
    fast = "nccl" if dist.get_backend(whole.group) == "nccl" and not channel else "gloo"
    parts: list[FrameTransport] = []
    # Every process makes all groups, in the same order: torch names them by their number.
    for members, inside in [*((of_site, True) for of_site in ranks), (leaders, False)]:
        made = _among(whole, members, backend=fast if inside else "gloo", inside=inside, channel=channel)
        if made is not None:
            parts.append(made)
    if len(ranks[0]) == 1:
        return Alone(), parts[-1]
    return parts[0], parts[1] if len(parts) > 1 else None


def _among(
    whole: ProcessGroupTransport, ranks: Sequence[int], *, backend: str, inside: bool, channel: int
) -> ProcessGroupTransport | None:
    """A transport of a new group of some replicas; None where this one is not among them."""
    links, limit = whole._links, _limit_of(whole)
    longer = limit + timedelta(seconds=LONGER_S * (2 if inside else 1))
    try:
        group = dist.new_group([*ranks], backend=backend, timeout=longer)
    except RuntimeError as error:
        raise whole._lost(None, error) from error
    if whole.rank not in ranks or len(ranks) == 1:
        return None
    made = ProcessGroupTransport(
        group,
        device=whole.device if backend == "nccl" else "cpu",
        secret=None if links is None else links.secret,
        run="" if links is None else f"{links.run}/replicas {ranks}, channel {channel}",
        timeout_s=longer.total_seconds(),
    )
    if inside:
        made._limit = limit
    return made


def _limit_of(whole: ProcessGroupTransport) -> timedelta:
    """How long the group waits for a message."""
    if whole.device.type == "cpu" and whole._links is None:
        limit: timedelta = whole._group._get_backend(whole.device).options._timeout
        return limit
    return timedelta(seconds=whole._timeout_s)
