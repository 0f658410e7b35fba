"""Runs of the user's own model: resumed to the last bit, in parts, over replicas, and what they leave."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from muonwire.cli.main import main
from muonwire.errors import DivergedReplicasError, UsageError
from muonwire.spectra.models import open_model
from muonwire.tasks import TextSettings
from muonwire.train import TrainConfig, Trainer, checkpoint
from muonwire.train.accumulate import accumulate, split_batch
from muonwire.train.metrics import read_metrics
from muonwire.transport import SingleReplica, run_threads
from tests.small_lm import write_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "text.txt").write_text("In the beginning was the word, and the word was short. " * 60)
    return TextSettings(
        model=str(write_model(folder / "small")),
        text=(folder / "text.txt",),
        sequence=16,
        batch=4,
        evaluation_sequences=4,
    )


ADAPTERS = {"lora": 2, "lora_dropout": 0.3}
WAYS = [
    pytest.param(
        ADAPTERS, {"recipe": "one_bit_muon(interval=3)", "accumulate": 2, "clip": 0.5}, id="adapters"
    ),
    pytest.param(
        {**ADAPTERS, "dtype": "bfloat16", "checkpoint_activations": True}, {}, id="adapters of 16 bits"
    ),
    pytest.param({"dtype": "bfloat16"}, {"recipe": "one_bit_muon(interval=3)"}, id="whole, 16 bits"),
]


def config(task, **options):
    few = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 4, "digest_every": 3, "probes": 0}
    return TrainConfig(**{**few, "lr": 0.01, "tensorboard": False, "task": task, **options})


@pytest.mark.parametrize(("chosen", "options"), WAYS)
def test_a_run_that_was_cut_off_continues_with_bit_identical_losses(chosen, options, settings, tmp_path):
    made = replace(settings, **chosen)
    task, wanted = made.make(), config(made, **options)
    whole = Trainer(wanted, task, SingleReplica(), tmp_path / "whole").run()

    def stop_at_five(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(wanted, task, SingleReplica(), tmp_path / "cut").run(stop_at_five)
    torch.manual_seed(999)
    # Another process would read data and model again.
    again = Trainer(wanted, made.make(), SingleReplica(), tmp_path / "cut")
    assert again.resume()
    assert again.step == 4
    resumed = again.run()
    assert (resumed.weights_digest, resumed.final_eval_loss) == (whole.weights_digest, whole.final_eval_loss)
    losses = [[r.get("local_loss") for r in read_metrics(tmp_path / d)] for d in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 7
    if made.lora:
        shared = load_file(checkpoint.latest(tmp_path / "cut") / "model.safetensors")
        assert (
            sum(t.numel() for n, t in shared.items() if "lora_" in n) == whole.num_parameters == 2 * 2 * 544
        )
        assert not any("base_layer" in n or "embed_tokens" in n for n in shared)


def test_a_base_that_was_changed_is_refused(settings, tmp_path):
    source = write_model(tmp_path / "source")
    made = replace(settings, model=str(source), lora=2)
    Trainer(config(made), made.make(), SingleReplica(), tmp_path / "run").run()
    write_model(source, rms_norm_eps=1e-3, vocabulary=265)
    with pytest.raises(UsageError, match=r"belongs to another run: task\.base_digest was"):
        Trainer(config(made), made.make(), SingleReplica(), tmp_path / "run").resume()


def test_the_parts_of_a_batch_give_its_gradient(settings):
    task = settings.make()
    model = task.build_model(seed=0)
    batch = task.batch(seed=0, step=1, rank=0, world_size=1)
    found = []
    for parts in (1, 2, 4):
        model.zero_grad()
        loss = accumulate(lambda part: task.loss(model, part), batch, parts=parts)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in found[1:]:
        # Means of means, in float32.
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="accumulate is 3, but a replica's batch is 4"):
        split_batch(batch, 3)
    with pytest.raises(UsageError, match="accumulate is 3"):
        Trainer(config(settings, accumulate=3), task, SingleReplica(), settings.text[0].parent / "refused")


def test_a_gradient_is_shortened_to_clip(settings, tmp_path):
    task = settings.make()
    trainer = Trainer(config(settings, clip=1e-3, recipe="sgd"), task, SingleReplica(), tmp_path)
    norms = []

    def norm(optimizer, *_):
        grads = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        norms.append(float(torch.cat(grads).norm()))

    trainer.optimizer.register_step_pre_hook(norm)
    trainer.run()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-3)


def test_a_gradient_that_is_too_long_to_be_measured_ends_the_run(settings, tmp_path):
    trainer = Trainer(config(settings, clip=1.0), settings.make(), SingleReplica(), tmp_path)
    for param in trainer.model.parameters():
        # Finite, as the loss is, but its square is not.
        param.register_hook(lambda grad: torch.full_like(grad, 1e30))
    result = trainer.run()
    assert (result.diverged, result.steps) == (True, 0)


def run_two(made, tmp_path, transport, *, models=None, **options):
    mine = made if models is None else replace(made, model=str(models[transport.rank]))
    trainer = Trainer(config(made, **options), mine.make(), transport, tmp_path)
    result = trainer.run()
    trainer.export(tmp_path / "model")
    return result


def test_replicas_exchange_adapters_alone(settings, tmp_path):
    made = replace(settings, **ADAPTERS)
    dense, one_bit = (
        run_threads(
            lambda _, make, r=r: run_two(made, tmp_path / r.partition("(")[0], make(), recipe=r), replicas=2
        )
        for r in ("muon", "one_bit_muon(interval=3)")
    )
    for results in (dense, one_bit):
        assert results[0].weights_digest == results[1].weights_digest
    # Float32 gradients of the adapters and nothing else; frames and headers come on top.
    assert 32 <= dense[0].bits_per_parameter_step < 33
    assert one_bit[0].bits_per_parameter_step < 2
    assert (tmp_path / "one_bit_muon/model/adapter_model.safetensors").is_file()


def test_replicas_with_different_bases_are_told(settings, tmp_path):
    models = [write_model(tmp_path / name) for name in ("one", "other")]
    changed = load_file(models[1] / "model.safetensors")
    changed["model.norm.weight"] += 1
    save_file(changed, models[1] / "model.safetensors", metadata={"format": "pt"})
    made = replace(settings, lora=2)
    with pytest.raises(DivergedReplicasError, match=r"model\.norm\.weight.* differs"):
        run_threads(lambda _, make: run_two(made, tmp_path / "run", make(), models=models), replicas=2)


def test_the_command_leaves_a_model_and_its_checkpoint_opens_with_adapters_merged(settings, tmp_path, capsys):
    few = ("--steps", "2", "--batch", "2", "--sequence", "16", "--evaluation-sequences", "2", "--probes", "0")
    text = ("--text", str(settings.text[0]), "--no-tensorboard", "--no-page")
    out = tmp_path / "run"
    options = ("--model", settings.model, "--lora", "2", "--recipe", "muon", "--out", str(out))
    with pytest.raises(SystemExit) as ended:
        main(["train", *options, *few, *text])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"the trained model is in {out / 'model'}" in said
    result = json.loads((out / "result.json").read_text())
    opened = open_model(str(out), device="cpu")
    assert opened.tokens.decode(opened.tokens.encode("word")) == "word"
    made = replace(settings, lora=2, batch=2, evaluation_sequences=2)
    task = made.make()
    loss, terms = task.evaluate(opened.model, rank=0, world_size=1)
    # Merging multiplies out B A, in float32.
    assert loss / terms == pytest.approx(result["final_eval_loss"], rel=1e-5)
