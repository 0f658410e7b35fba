"""Means that get the length of what was sent: the formula, by every way that means are made, the same bits on all replicas."""

import math

import pytest
import torch

from muonwire import stages
from muonwire.codec import parse
from muonwire.codec import payload as payloads
from muonwire.errors import PayloadError, UsageError
from muonwire.stages import Reply
from muonwire.stages.lengthen import lengthened
from muonwire.transport import run_threads
from tests.stages.lockstep import context, run_lockstep
from tests.stages.test_owners import all_alike, bits, exchange, made, stepped

SHAPES = [(6, 9), (7,), (1, 1), (), (0, 3), (3, 2, 4)]
# g is rounded to bfloat16.
ROUNDING = 2.0**-8


@pytest.mark.parametrize(
    "codec",
    [
        "float32",
        "sign(scale=tensor)",
        "sign(scale=row)",
        "sign(scale=none)",
        "topk(density=0.3) | int(bits=4)",
    ],
)
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_the_mean_gets_the_length_of_what_was_sent(codec, replicas):
    sent = [[made(shape, rank, i) for i, shape in enumerate(SHAPES)] for rank in range(replicas)]
    one = stages.Exchange(codec=parse(codec), lengthen=True)
    params = [torch.zeros(shape) for shape in SHAPES]
    states = [[one.init(p) for p in params] for _ in sent]
    results, rounds = run_lockstep(one, sent, params, states)
    assert len(rounds) == 1, "what replicas sent is in the payloads: nothing more is exchanged"
    for i in range(len(SHAPES)):
        decoded = [one.codec.decode(one.codec.encode(of_rank[i])) for of_rank in sent]
        mean = torch.stack(decoded).double().mean(0)
        length = sum(float(d.double().norm()) for d in decoded) / replicas
        gain = length / float(mean.norm()) if mean.any() else 1.0
        assert gain >= 1 - 1e-6
        expected = mean * min(gain, math.sqrt(replicas))
        for of_rank in results:
            assert torch.equal(of_rank[i], results[0][i])
            # A factor's rounding, and that of a float32 mean of a few numbers.
            torch.testing.assert_close(of_rank[i].double(), expected, rtol=ROUNDING, atol=1e-6)
    assert replicas == 1 or gain > 1.1


@pytest.mark.parametrize(
    ("text", "before"), [("sign(scale=tensor)", 2), ("turns(parts=7)|sign(scale=tensor)", 6)]
)
def test_the_length_is_read_without_decoding(text, before):
    signs, x = parse(text), made((12, 5), 1)
    body = signs.encode_body(x, seed=5).body
    decoded = signs.decode_body(body, (12, 5))
    assert float(signs.length(body, (12, 5))) == pytest.approx(float(decoded.double().norm()), rel=1e-12)
    # The signs themselves are not looked at.
    other = body[:before] + b"\x55" * (len(body) - before)
    assert signs.length(other, (12, 5)) == signs.length(body, (12, 5))


def test_replicas_that_agree_lose_nothing_and_get_nothing():
    x = made((4, 4), 3)
    mean = lengthened(x.clone(), [x.double().norm()] * 4, replicas=4)
    assert torch.equal(mean, x)


@pytest.mark.parametrize("means", ["gather", "recompressed"])
@pytest.mark.parametrize("replicas", [3, 4, 6])
def test_a_part_sent_in_turns_stands_for_the_length_of_the_whole(means, replicas):
    """Replicas that agree on signs of one size: the mean of what they send in turns is what each has, and stays it."""
    more = {"mean_codec": parse("float32")} if means == "recompressed" else {}
    one = stages.Exchange(
        codec=parse("turns(parts=3) | float32"), over="senders", means=means, lengthen=True, **more
    )
    shapes = [(6, 6), (12,), (5, 7)]

    def gradient(shape, step, rank, index):
        return made(shape, step, index).sign()

    weights = run_threads(
        lambda rank, make: stepped(make(), one, steps=1, shapes=shapes, gradient=gradient)[0],
        replicas=replicas,
    )
    assert all_alike([bits(of_rank) for of_rank in weights])
    for i, shape in enumerate(shapes):
        torch.testing.assert_close(
            weights[0][i].detach(), -gradient(shape, 0, 0, i), rtol=2 * ROUNDING, atol=0
        )


def test_a_mean_that_cancels_is_not_blown_up():
    x = torch.full((2, 2), 1e-20)
    lengths = [torch.tensor(1.0, dtype=torch.float64)] * 16
    # g is at most √16.
    assert torch.equal(lengthened(x.clone(), lengths, replicas=16), x * 4)
    assert not lengthened(torch.zeros(2, 2), lengths, replicas=16).any()


@pytest.mark.parametrize("codec", ["sign(scale=shared)", "sign(scale=none)"])
def test_lossless_owners_give_what_a_gather_gives(codec):
    def worker(means):
        return lambda rank, make: bits(stepped(make(), exchange(means, codec, lengthen=True))[0])

    gathered, lossless = (run_threads(worker(means), replicas=3) for means in ("gather", "lossless"))
    assert all_alike(gathered + lossless)
    plain = run_threads(lambda rank, make: bits(stepped(make(), exchange("gather", codec))[0]), replicas=3)
    assert not all_alike([plain[0], gathered[0]])


def test_owners_that_recompress_agree_on_the_lengths():
    def worker(means, **more):
        one = exchange(means, "float32", stages.NoFeedback(), lengthen=True, **more)
        return lambda rank, make: [w.detach().clone() for w in stepped(make(), one, steps=2)[0]]

    gathered, owned = (run_threads(worker(means), replicas=3) for means in ("gather", "recompressed"))
    assert all_alike([bits(weights) for weights in owned])
    for ours, theirs in zip(owned[0], gathered[0], strict=True):
        # The lengths travel as float32, which may round a factor otherwise.
        torch.testing.assert_close(ours, theirs, rtol=2 * ROUNDING, atol=1e-5)


def test_lengths_that_replicas_agree_on_are_counted():
    params = [torch.zeros(shape) for shape in SHAPES]
    layouts = [stages.MatrixLayout() for _ in params]

    def estimate(codec, **more):
        one = exchange("recompressed", codec, **more)
        return one.estimate_bytes(params, layouts, replicas=3)

    # Four bytes a tensor; six of them are parts of one size for three replicas.
    assert estimate("sign(scale=tensor)", lengthen=True) - estimate("sign(scale=tensor)") == 4 * len(SHAPES)


def test_a_feedback_that_restores_more_than_the_mean_is_refused():
    with pytest.raises(UsageError, match=r"lengthen=True with the feedback EF21.*EF14 and NoFeedback"):
        stages.Exchange(codec=parse("float32"), feedback=stages.EF21(), lengthen=True)


def test_a_damaged_payload_is_blamed_on_its_sender():
    one = stages.Exchange(codec=parse("sign(scale=tensor)"), lengthen=True)
    good = one.send([made((4, 4), 1)], [torch.zeros(4, 4)], [{}], context([torch.zeros(4, 4)])).payload
    body = one.codec.encode_body(made((4, 4), 2)).body
    bad = payloads.pack(str(one.codec), [((4, 4), torch.float32, b"\xff\x7f" + body[2:])])
    with pytest.raises(PayloadError, match="from replica 1"):
        one.receive(Reply(payloads=[good, bad]), [torch.zeros(4, 4)], [{}], context([torch.zeros(4, 4)]))
