"""transformers' Trainer takes an optimizer of ours, saves it, and resumes to the undisturbed end."""

import pytest
import torch

from muonwire import recipes


def run(name, options, out, resume=None):
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    from tests.integrations.tiny import Tokens, llama

    model = llama()
    optimizer = recipes.build(name, model, lr=0.01, **options)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=4,
            logging_steps=100,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
            max_grad_norm=1.0,
        ),
        train_dataset=Tokens(length=64),
        optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, 2, 8)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize(
    ("name", "options"), [("muon", {}), ("one_bit_muon", {"interval": 3}), ("psyche", {})]
)
def test_a_resumed_training_ends_where_the_undisturbed_one_does(name, options, tmp_path):
    whole, optimizer = run(name, options, tmp_path / "whole")
    resumed, again = run(name, options, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert optimizer.num_steps == again.num_steps == 8
    for parameter, weight in whole.items():
        assert torch.equal(weight, resumed[parameter]), parameter
