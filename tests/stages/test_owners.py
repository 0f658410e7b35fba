"""Means by owners: the same bits as a gather where nothing is lost, feedback where something is, and errors that name who sent."""

import itertools
import math

import pytest
import torch

from muonwire import stages
from muonwire.codec import parse
from muonwire.codec import parts as part_format
from muonwire.errors import NonFiniteUpdateError, PayloadError, ReplicaLostError, UsageError
from muonwire.optim import ChainOptimizer
from muonwire.optim.sharing import load_shared, own_entries, shared_part
from muonwire.stages.pieces import UNITS, cut
from muonwire.stages.rounds import Request, drive, perform
from muonwire.transport import ProcessGroupTransport, run_threads
from tests.replicas import run_replicas
from tests.slow import slow_unless

SHAPES = [(6, 9), (7,), (12, 5), (1, 1), (), (0, 3), (3, 2, 4)]
SHARED = "sign(scale=shared)"
SIGN = parse("sign(scale=tensor)")


def made(shape, *key):
    seed = sum((n + 1) * 1009**i for i, n in enumerate(key))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(transport, exchange, *, steps=3, shapes=SHAPES, optimizer=None, start=0, gradient=made):
    """Weights that begin at zero, after steps of rate 1; and the optimizer."""
    if optimizer is None:
        weights = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        optimizer = ChainOptimizer(weights, chain=exchange, lr=1.0, transport=transport)
    weights = optimizer.param_groups[0]["params"]
    for step in range(start, start + steps):
        for i, weight in enumerate(weights):
            weight.grad = gradient(weight.shape, step, transport.rank, i)
        optimizer.step()
    return weights, optimizer


def bits(weights):
    return [w.detach().view(torch.int32).clone() for w in weights]


def exchange(means, codec=SHARED, feedback=None, **more):
    return stages.Exchange(
        codec=parse(codec), feedback=feedback or stages.EF14(decay=0.9), means=means, **more
    )


def all_alike(by_rank):
    first, *others = by_rank
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("codec", "feedback", "replicas"),
    # Sixteen replicas with every second pair of a codec and a feedback.
    slow_unless(
        lambda index, codec, feedback, replicas: replicas < 16 or index % 2 == 0,
        itertools.product(
            [SHARED, "sign(scale=none)"],
            [stages.EF14(decay=0.9), stages.EF21(), stages.NoFeedback()],
            [1, 2, 3, 5, 16],
        ),
        ids=lambda codec, feedback, replicas: f"{codec}-{feedback}-{replicas}",
    ),
)
def test_lossless_is_the_gather_to_the_last_bit_on_all_replicas(replicas, feedback, codec):
    def worker(means):
        def run(rank, make):
            weights, optimizer = stepped(make(), exchange(means, codec, feedback))
            states = [optimizer.state[w].get("exchange", {}) for w in weights]
            return bits(weights), [{k: v for k, v in state.items() if k != "sums"} for state in states]

        return run

    gathered, lossless = (run_threads(worker(means), replicas=replicas) for means in ("gather", "lossless"))
    assert all_alike([w for w, _ in lossless])
    for (theirs, their_states), (ours, our_states) in zip(gathered, lossless, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
        # What each keeps for later rounds is the same, too.
        assert str(their_states) == str(our_states)
    assert any(w.any() for w in lossless[0][0])


def test_groups_whose_signs_are_the_same_keep_scales_of_their_own():
    """Replicas of one process share what they decode alike; the sums of these two groups are alike, their scales are not."""

    def worker(means):
        def run(rank, make):
            weights = [torch.nn.Parameter(torch.zeros(5, 8)) for _ in range(2)]
            groups = [{"params": [weight]} for weight in weights]
            optimizer = ChainOptimizer(groups, chain=exchange(means), lr=1.0, transport=make())
            for weight, factor in zip(weights, (1, 3), strict=True):
                weight.grad = factor * made(weight.shape, rank)
            optimizer.step()
            return bits(weights)

        return run

    gathered, lossless = (run_threads(worker(means), replicas=3) for means in ("gather", "lossless"))
    for theirs, ours in zip(gathered, lossless, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
        assert not torch.equal(*ours)


def _lossless_in_a_process():
    return [bits(stepped(ProcessGroupTransport(), exchange(means))[0]) for means in ("gather", "lossless")]


def test_processes_get_the_bits_of_threads():
    threads = run_threads(lambda _, make: bits(stepped(make(), exchange("gather"))[0]), replicas=3)
    for there, (gathered, lossless) in zip(threads, run_replicas(_lossless_in_a_process, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, gathered, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(there, lossless, strict=True))


def test_the_shared_scale_is_the_mean_of_the_mean_magnitudes():
    def worker(rank, make):
        weights, _ = stepped(make(), exchange("lossless", feedback=stages.NoFeedback()), steps=1)
        return [w.detach() for w in weights]

    got = run_threads(worker, replicas=3)[0]
    for i, shape in enumerate(SHAPES):
        updates = torch.stack([made(shape, 0, rank, i) for rank in range(3)])
        if not updates.numel():
            continue
        scale = updates.abs().reshape(3, -1).mean(1).mean().bfloat16().float()
        signs = torch.where(updates >= 0, 1.0, -1.0).sum(0)
        assert torch.equal(got[i], -(scale * signs / 3))


RECOMPRESSED = [
    ("sign(scale=tensor)", None),
    (SHARED, None),
    ("sign(scale=row)", None),
    ("topk(density=0.3) | sign(scale=tensor)", "int(bits=4)"),
    ("dct(chunk=4) | topk(k=2) | sign(scale=chunk)", None),
    ("randomk(density=0.5) | float32", "bfloat16"),
    ("lowrank(rank=2) | bfloat16", "sign(scale=row)"),
    ("float32", None),
    ("int(bits=4, rounding=stochastic)", None),
]


@pytest.mark.parametrize(
    ("replicas", "prediction"),
    slow_unless(
        lambda _, replicas, prediction: not prediction or replicas == 3,
        itertools.product([1, 2, 3, 5], [0.0, 0.6]),
    ),
)
@pytest.mark.parametrize(("codec", "mean_codec"), RECOMPRESSED)
def test_what_is_lost_on_either_way_is_kept_and_sent_later(codec, mean_codec, replicas, prediction):
    """What moved the weights, the mean of what senders keep, and what owners keep add up to the mean of all updates."""
    steps = 5

    def worker(rank, make):
        made_of = {"mean_codec": parse(mean_codec)} if mean_codec else {}
        made_of |= {"mean_prediction": prediction}
        weights, optimizer = stepped(
            make(), exchange("recompressed", codec, stages.EF14(), **made_of), steps=steps
        )
        states = [optimizer.state[w]["exchange"] for w in weights]
        return [w.detach() for w in weights], [s["residual"] for s in states], [s["owner"] for s in states]

    by_rank = run_threads(worker, replicas=replicas)
    assert all_alike([w for w, _, _ in by_rank])
    for i, shape in enumerate(SHAPES):
        given = sum(made(shape, s, r, i).double() for s in range(steps) for r in range(replicas)) / replicas
        kept = torch.stack([residuals[i] for _, residuals, _ in by_rank]).double().mean(0).flatten()
        covered = 0
        for _, _, owners in by_rank:
            if owners[i]:
                piece, begin = owners[i]["residual"], owners[i]["begin"]
                kept[begin : begin + piece.numel()] += piece
                covered += piece.numel()
        # Every entry has one owner.
        assert covered == math.prod(shape)
        moved = -by_rank[0][0][i].double().flatten()
        sizes = sum(made(shape, s, r, i).norm() for s in range(steps) for r in range(replicas)) + 1
        # Some ten roundings a step, transforms included, of numbers of this size.
        error = (moved + kept - given.flatten()).norm()
        assert error <= 16 * steps * torch.finfo(torch.float32).eps * sizes
    if codec not in ("float32",) and replicas > 1:
        assert any(owner and owner["residual"].any() for _, _, owners in by_rank for owner in owners)


def test_a_mean_is_a_share_of_the_last_one_and_what_has_changed():
    """u ← ρ u′ + decode(encode(m + β e − ρ u′)), e ← m + β e − u, of a tensor that one replica owns."""
    share, decay, shape = 0.7, 0.9, (5, 4)
    mean_codec = parse("sign(scale=tensor)")

    def worker(rank, make):
        made_of = exchange("recompressed", "float32", mean_codec=mean_codec, mean_prediction=share)
        means, last, optimizer = [], torch.zeros(shape), None
        for step in range(4):
            weights, optimizer = stepped(
                make() if optimizer is None else optimizer.transport,
                made_of,
                steps=1,
                shapes=[shape],
                optimizer=optimizer,
                start=step,
            )
            means.append(last - weights[0].detach())
            last = weights[0].detach().clone()
        return means, optimizer.state[weights[0]]["exchange"]["last"]["mean"]

    means, kept = run_threads(worker, replicas=1)[0]
    u, e = torch.zeros(shape), torch.zeros(shape)
    for step, mean in enumerate(means):
        signal = made(shape, step, 0, 0) + decay * e
        u = share * u + mean_codec.decode(mean_codec.encode(signal - share * u))
        e = signal - u
        torch.testing.assert_close(mean, u)
    torch.testing.assert_close(kept, u)


def test_a_mean_that_stays_is_reached():
    """Signs of what has changed come as close as one likes to a mean that does not change; signs of the mean itself do not."""

    def worker(prediction):
        def run(rank, make):
            made_of = exchange(
                "recompressed", "float32", stages.NoFeedback(), mean_prediction=prediction, mean_codec=SIGN
            )
            weights, optimizer = stepped(make(), made_of, steps=40, gradient=lambda shape, *_: made(shape, 1))
            before = [w.detach().clone() for w in weights]
            stepped(
                optimizer.transport, None, steps=1, optimizer=optimizer, gradient=lambda s, *_: made(s, 1)
            )
            pairs = zip(before, weights, strict=True)
            return [float((a - b.detach() - made(a.shape, 1)).norm()) for a, b in pairs]

        return run

    still, following = (run_threads(worker(p), replicas=2)[0][0] for p in (0.0, 1.0))
    assert following < 0.1 * still


def test_without_loss_on_either_way_it_is_the_mean():
    def worker(means):
        return lambda rank, make: bits(stepped(make(), exchange(means, "float32"))[0])

    gathered, owned = (run_threads(worker(m), replicas=3) for m in ("gather", "recompressed"))
    assert all(
        torch.equal(a, b) for x, y in zip(gathered, owned, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("feedback", [stages.EF21(), stages.ResidualMomentum()], ids=str)
def test_other_feedbacks_go_through_owners(feedback):
    def worker(rank, make):
        over = "replicas" if feedback.needs_replicas else "senders"
        made_of = exchange("recompressed", "topk(density=0.4) | sign(scale=tensor)", feedback, over=over)
        return bits(stepped(make(), made_of, steps=4)[0])

    assert all_alike(run_threads(worker, replicas=3))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("owners", [1, 2, 3, 7, 64, 1000])
def test_pieces_cover_each_entry_once_and_are_balanced(unit, owners):
    shapes = (*SHAPES, (40, 16), (64,))
    seen = [torch.zeros(math.prod(s)) for s in shapes]
    parts = cut(shapes, owners, unit)
    assert len(parts) == owners
    for piece in itertools.chain(*parts):
        seen[piece.tensor][piece.begin : piece.end] += 1
        assert math.prod(piece.shape) == piece.end - piece.begin > 0
    assert all((s == 1).all() for s in seen)
    sizes = [sum(p.end - p.begin for p in pieces) for pieces in parts]
    largest_unit = {"entry": 1, "row": 16, "tensor": 640}[unit]
    even = sum(map(math.prod, shapes)) / owners
    assert all(abs(size - even) <= largest_unit for size in sizes)


def test_auto_takes_what_sends_least():
    shapes = ((400, 256),)
    auto = exchange("auto")
    assert [auto.form(shapes, r) for r in (1, 2, 3, 4, 64)] == ["gather"] * 3 + ["lossless"] * 2
    plain = exchange("auto", "sign(scale=tensor)")
    assert [plain.form(shapes, r) for r in (1, 2, 3, 64)] == ["gather"] * 2 + ["recompressed"] * 2
    # Its sums of many replicas would be longer than what a second lossy codec makes of them; still nothing is lost.
    assert exchange("auto", "lowrank(rank=1) | float32").form(shapes, 64) == "gather"
    sparse = exchange("auto", "topk(density=0.01) | sign(scale=tensor)", mean_codec=parse("float32"))
    assert [sparse.form(shapes, r) for r in (64, 512)] == ["gather", "recompressed"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"means": "tree"}, "allowed are gather, lossless, recompressed, auto"),
        ({"means": "lossless", "codec": "sign(scale=tensor)"}, r"sign\(scale=shared\) or sign\(scale=none\)"),
        ({"means": "lossless", "codec": "topk(k=3) | sign(scale=none)"}, "take means=recompressed"),
        ({"means": "recompressed", "codec": "lowrank(rank=2) | float32"}, "give another mean_codec"),
        ({"means": "lossless", "mean_codec": parse("float32")}, "it is for means=recompressed and auto"),
        ({"means": "gather", "mean_codec": parse("float32")}, "it is for means=recompressed and auto"),
        ({"means": "lossless", "mean_prediction": 0.5}, "it is for means=recompressed and auto"),
        ({"means": "recompressed", "mean_prediction": 1.5}, "mean_prediction is 1.5; allowed is 0 to 1"),
    ],
)
def test_what_cannot_be_says_what_can(options, says):
    with pytest.raises(UsageError, match=says):
        exchange(options.pop("means"), options.pop("codec", SHARED), **options)


def test_the_textual_form_of_a_gather_is_what_it_was():
    assert str(exchange("gather", "float32", stages.NoFeedback())) == "exchange(float32)"
    assert str(exchange("lossless")) == "exchange(sign(scale=shared), EF14(decay=0.9), means=lossless)"
    recompressed = exchange("recompressed", mean_codec=parse("int(bits=4)"))
    assert str(recompressed).endswith(
        "means=recompressed, mean_codec=int(bits=4, scale=tensor, rounding=nearest))"
    )


def test_a_scale_is_not_shared_behind_a_transform_or_selection():
    for text in ("dct(chunk=8) | sign(scale=shared)", "topk(k=3) | sign(scale=shared)"):
        with pytest.raises(UsageError, match="leave both out"):
            parse(text)


def _forged(rank, make, *, means, forge, to=1, steps=1, codec=SHARED):
    """One of three replicas, of which replica 2 sends to ``to`` what ``forge`` makes of it; what all raise."""
    transport = make()
    if rank == 2:
        all_to_all = transport.all_to_all

        def forged(payloads, **options):
            return all_to_all([forge(p) if j == to else p for j, p in enumerate(payloads)], **options)

        transport.all_to_all = forged
    with pytest.raises(PayloadError) as caught:
        stepped(transport, exchange(means, codec), steps=steps)
    return str(caught.value)


def _flipped(payload):
    middle = len(payload) // 2
    return payload[:middle] + bytes([payload[middle] ^ 4]) + payload[middle + 1 :]


def _resealed(change):
    """The payload with changed bodies under a right checksum."""

    def forge(payload):
        shapes = [p.shape for p in cut(tuple(SHAPES), 3, "entry")[1]]
        bodies = part_format.unpack(payload, codec_text=SHARED, shapes=shapes)
        return part_format.pack(SHARED, shapes, change(bodies))

    return forge


FORGERIES = {
    "damaged": (_flipped, "checksum"),
    "cut off": (lambda p: p[:-3], "checksum"),
    "empty": (lambda p: b"", "0 bytes are fewer"),
    "version": (lambda p: b"\x07" + p[1:], "version 7, this reader knows 1"),
    "longer": (lambda p: p + b"x", "checksum"),
    "refused": (
        lambda p: part_format.refuse("I do not like it"),
        "refuses what it was sent: I do not like it",
    ),
    "another codec": (
        lambda p: part_format.pack("float32", [(3,)], [bytes(12)]),
        "written for another codec or other pieces",
    ),
    "body too short": (
        _resealed(lambda bodies: [bodies[0][:-1], *bodies[1:]]),
        "values with their scale take",
    ),
    "another scale": (
        _resealed(lambda bodies: [b"\x80\x3f" + bodies[0][2:], *bodies[1:]]),
        "its scale is 803f, all replicas have agreed on",
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_bad_part_is_one_error_on_all_replicas_that_names_its_sender(kind):
    forge, says = FORGERIES[kind]
    texts = run_threads(lambda rank, make: _forged(rank, make, means="lossless", forge=forge), replicas=3)
    assert len(set(texts)) == 1
    assert texts[0].startswith(
        "from replica 1, the owner of part 1: refuses what it was sent: from replica 2: "
    )
    assert says in texts[0]


@pytest.mark.parametrize("kind", ["damaged", "cut off", "empty", "body too short"])
def test_so_it_is_where_the_mean_is_compressed(kind):
    forge, _ = FORGERIES[kind]
    texts = run_threads(lambda rank, make: _forged(rank, make, means="recompressed", forge=forge), replicas=3)
    assert len(set(texts)) == 1
    assert "refuses what it was sent: from replica 2: " in texts[0]


def test_values_whose_sum_is_not_finite_are_named():
    def worker(rank, make):
        transport, update = make(), torch.full((6,), 3e38 if rank == 1 else 2e38)
        stage = exchange("recompressed", "float32")
        context = stages.Context(lr=1.0, step=1, transport=transport, layouts=[stages.MatrixLayout()])
        with pytest.raises(PayloadError) as caught:
            drive([stage.rounds([update], [update], [stage.init(update)], context)], transport)
        return str(caught.value)

    texts = run_threads(worker, replicas=3)
    assert len(set(texts)) == 1
    assert (
        "from replica 1: entries 0 to 2 of tensor 0: its values, up to 3e+38, are the largest in a sum"
        in texts[0]
    )


@pytest.mark.parametrize("means", ["lossless", "recompressed"])
def test_a_bad_mean_names_its_owner(means):
    def worker(rank, make):
        transport = make()
        gather = transport.gather
        if rank == 1:
            transport.gather = lambda payload, **options: gather(
                _flipped(payload) if options.get("observers") else payload, **options
            )
        with pytest.raises(PayloadError, match=r"from replica 1, the owner of part 1: payload: checksum"):
            stepped(transport, exchange(means), steps=1)

    run_threads(worker, replicas=3)


@pytest.mark.parametrize("means", ["lossless", "recompressed"])
@pytest.mark.parametrize("operation", [1, 2, 3])
def test_a_replica_that_ends_in_the_middle_leaves_the_others_states_as_they_were(means, operation):
    ended = []

    def worker(rank, make):
        transport = make()
        _, optimizer = stepped(transport, exchange(means), steps=2)
        before = str(optimizer.state_dict())
        carry, calls = transport.carry, []

        def dies(*args):
            calls.append(1)
            if len(calls) == operation + 1:
                raise KeyError("gone")
            return carry(*args)

        if rank == 2:
            transport.carry = dies
        try:
            stepped(transport, None, steps=1, optimizer=optimizer, start=2)
        except ReplicaLostError:
            ended.append(str(optimizer.state_dict()) == before)

    with pytest.raises(KeyError):
        run_threads(worker, replicas=3)
    assert ended == [True, True]


@pytest.mark.parametrize("means", ["lossless", "recompressed"])
def test_what_is_not_finite_changes_nothing_on_any_replica(means):
    def bad(shape, step, rank, i):
        return made(shape, step, rank, i) * (math.nan if (rank, i) == (1, 2) else 1)

    def worker(rank, make):
        transport = make()
        weights, optimizer = stepped(transport, exchange(means), steps=2)
        before = str(optimizer.state_dict())
        with pytest.raises(NonFiniteUpdateError):
            stepped(transport, None, steps=1, optimizer=optimizer, start=2, gradient=bad)
        assert str(optimizer.state_dict()) == before
        stepped(transport, None, steps=1, optimizer=optimizer, start=3)
        return bits(weights)

    assert all_alike(run_threads(worker, replicas=3))


@pytest.mark.parametrize(("means", "prediction"), [("lossless", 0), ("recompressed", 0.5), ("auto", 0)])
def test_replicas_that_resume_go_on_to_the_bit(means, prediction):
    codec = "sign(scale=tensor)" if means == "auto" else SHARED
    made_of = exchange(means, codec, mean_prediction=prediction)

    def worker(rank, make):
        weights, optimizer = stepped(make(), made_of, steps=3)
        saved = optimizer.state_dict()
        transport = make()
        fresh = [torch.nn.Parameter(w.detach().clone()) for w in weights]
        second = ChainOptimizer(fresh, chain=made_of, lr=1.0, transport=transport)
        second.load_state_dict(saved)
        stepped(transport, None, steps=2, optimizer=second, start=3)
        stepped(optimizer.transport, None, steps=2, optimizer=optimizer, start=3)
        kept = "sums" if means == "lossless" else "owner"
        assert any(second.state[w]["exchange"][kept] for w in fresh)
        return all(torch.equal(a, b) for a, b in zip(bits(weights), bits(fresh), strict=True))

    assert all(run_threads(worker, replicas=3))


def test_what_an_owner_keeps_is_its_own_and_begins_anew_where_parts_move():
    def first(rank, make):
        _, optimizer = stepped(make(), exchange("recompressed"), steps=2)
        assert "exchange.owner.residual" in own_entries(optimizer)
        assert "owner" not in str(shared_part(optimizer))
        return optimizer.state_dict()

    saved = run_threads(first, replicas=3)

    def second(rank, make):
        transport = make()
        _, optimizer = stepped(transport, exchange("recompressed"), steps=0)
        optimizer.load_state_dict(saved[rank])
        for group in optimizer.param_groups:
            group["step"] = 2
        stepped(transport, None, steps=1, optimizer=optimizer, start=2)
        return [optimizer.state[p]["exchange"]["owner"] for p in optimizer.param_groups[0]["params"]], bits(
            optimizer.param_groups[0]["params"]
        )

    results = run_threads(second, replicas=2)
    assert all_alike([w for _, w in results])
    cuts = cut(tuple(SHAPES), 2, "entry")
    for rank, (owners, _) in enumerate(results):
        owned = {p.tensor: p for p in cuts[rank]}
        for i, owner in enumerate(owners):
            assert (i in owned) == bool(owner)
            if owner:
                assert (owner["begin"], owner["residual"].numel()) == (
                    owned[i].begin,
                    owned[i].end - owned[i].begin,
                )


def alike_gradients(shape, step, rank, i):
    """A direction that all replicas and steps share, and a noise of its own."""
    return made(shape, 99, i) + 0.7 * made(shape, step, rank, i)


LARGE = [(80, 60), (64,)]


def test_the_last_sums_are_kept_alike_by_all_and_make_the_next_shorter():
    def worker(rank, make):
        transport, sent = make(), []
        gather = transport.gather

        def counted(payload, **options):
            if options.get("observers"):
                sent.append(len(payload))
            return gather(payload, **options)

        transport.gather = counted
        made_of = exchange("lossless", feedback=stages.NoFeedback())
        weights, optimizer = stepped(transport, made_of, steps=3, shapes=LARGE, gradient=alike_gradients)
        levels = [optimizer.state[w]["exchange"]["sums"]["levels"] for w in weights]
        return sent, levels

    results = run_threads(worker, replicas=5)
    assert all_alike([levels for _, levels in results])
    for i, shape in enumerate(LARGE):
        positive = sum((alike_gradients(shape, 2, rank, i) >= 0).long() for rank in range(5))
        found = results[0][1][i]
        assert (found.dtype, found.shape) == (torch.uint8, shape)
        assert torch.equal(found, torch.round(positive * 32 / 5).to(torch.uint8))
    first, second, third = (sum(lengths) for lengths in zip(*(sent for sent, _ in results), strict=True))
    assert second < 0.8 * first
    assert third < 0.8 * first


HELD = pytest.mark.parametrize(
    ("made_of", "held"),
    [
        (exchange("lossless"), ("sums", "levels")),
        (exchange("recompressed", mean_prediction=0.5), ("last", "mean")),
    ],
    ids=["sums", "mean"],
)


@HELD
@pytest.mark.parametrize(("entry", "raise_it"), [(0, {1}), (2000, {0, 2})], ids=["another's part", "its own"])
def test_a_replica_that_knows_another_round_before_is_an_error_and_not_another_mean(
    entry, raise_it, made_of, held
):
    """Replica 1 does: it cannot read what the owner of that entry sends, nor others what it sends as an owner itself."""

    def worker(rank, make):
        transport = make()
        weights, optimizer = stepped(transport, made_of, steps=2, shapes=LARGE)
        if rank == 1:
            kind, name = held
            before = optimizer.state[weights[0]]["exchange"][kind]
            # A tensor of its own: replicas of one process share what they have found alike.
            before[name] = before[name].clone()
            before[name].view(-1)[entry] = (before[name].view(-1)[entry] + 1) % 32
        before = str(optimizer.state_dict())
        try:
            stepped(transport, None, steps=1, optimizer=optimizer, start=2)
        except PayloadError as error:
            return str(error), str(optimizer.state_dict()) == before
        return None

    raised = {rank: found for rank, found in enumerate(run_threads(worker, replicas=3)) if found}
    assert set(raised) == raise_it
    for text, unchanged in raised.values():
        assert "written for another codec or other pieces" in text
        assert unchanged


@HELD
@pytest.mark.parametrize("replicas", [2, 4])
def test_one_that_joins_is_given_the_last_sums_or_mean(replicas, made_of, held):
    """The parts move, and sums are of more or fewer signs; the levels of the sums before, or the last mean, stay what they are."""

    def first(rank, make):
        _, optimizer = stepped(make(), made_of, steps=2)
        assert f"exchange.{'.'.join(held)}" not in own_entries(optimizer)
        return optimizer.state_dict(), shared_part(optimizer)

    saved = run_threads(first, replicas=3)

    def second(rank, make):
        transport = make()
        weights, optimizer = stepped(transport, made_of, steps=0)
        if rank < 2:
            optimizer.load_state_dict(saved[rank][0])
        else:
            load_shared(optimizer, saved[0][1])
        kind, name = held
        assert all(name in optimizer.state[w]["exchange"][kind] for w in weights)
        stepped(transport, None, steps=2, optimizer=optimizer, start=2)
        return bits(weights)

    assert all_alike(run_threads(second, replicas=replicas))


def test_one_that_observes_owns_its_part_and_counts_in_no_mean():
    def worker(means):
        def run(rank, make):
            transport = make()
            transport.observes = rank == 1
            weights, _ = stepped(transport, exchange(means), steps=3)
            return bits(weights)

        return run

    gathered = run_threads(worker("gather"), replicas=3)
    lossless = run_threads(worker("lossless"), replicas=3)
    recompressed = run_threads(worker("recompressed"), replicas=3)
    assert all_alike(lossless)
    assert all_alike(recompressed)
    assert all(torch.equal(a, b) for a, b in zip(gathered[0], lossless[0], strict=True))


def test_rounds_of_all_kinds_share_their_messages():
    def worker(rank, make):
        transport = make()
        sent = []
        for name in ("gather", "all_to_all", "mean"):
            operation = getattr(transport, name)
            setattr(
                transport,
                name,
                lambda *args, name=name, operation=operation, **options: (
                    sent.append((name, options)) or operation(*args, **options)
                ),
            )
        requests = [
            Request(payload=b"a"),
            Request(parts=[b"0%d" % rank, b"1"]),
            Request(payload=b"mean", observers=True),
            Request(parts=[b"", b"x"]),
            Request(payload=b"b"),
            Request(tensors=[torch.ones(2)]),
        ]
        replies = perform(requests, transport)
        assert sorted(name for name, _ in sent) == ["all_to_all", "gather", "gather", "mean"]
        return [r.payloads for r in replies]

    first, second = run_threads(worker, replicas=2)
    assert first == [(b"a", b"a"), (b"00", b"01"), (b"mean", b"mean"), (b"", b""), (b"b", b"b"), ()]
    assert second[1] == (b"1", b"1")
    assert second[3] == (b"x", b"x")
