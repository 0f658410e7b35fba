"""transformers' Trainer on two replicas.

    torchrun --nproc-per-node 2 examples/trainer.py

Each replica is a Trainer of its own with half of the data. Every fifth step they exchange a bit a parameter. Run it again and it
goes on from the newest checkpoint that both have.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from muonwire.integrations import join_replicas
from muonwire.integrations.transformers import MuonwireCallback
from muonwire.transport import digest_all

# Before TrainingArguments, which would take the other replica for a second GPU of this one.
replicas = join_replicas()

# Python's own source, byte by byte.
text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
lines = [{"input_ids": line, "labels": line} for line in text[: len(text) // 64 * 64].view(-1, 64)]

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
)
args = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
    max_steps=20,
    learning_rate=0.01,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=10,
    save_steps=10,
    logging_steps=5,
    report_to="tensorboard",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
wire = MuonwireCallback("one_bit_muon(interval=5)", replicas=replicas)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=replicas.shard(lines[32:]),
    eval_dataset=lines[:32],
    optimizer_cls_and_kwargs=wire.optimizer_cls_and_kwargs,
    callbacks=wire.callbacks(args),
)
trainer.train(resume_from_checkpoint=wire.newest_checkpoint())

log = trainer.state.log_history
losses = [row["eval_loss"] for row in log if "eval_loss" in row]
bits = log[-1]["muonwire_bits_per_parameter_step"]
print(
    f"replica {replicas.rank}: evaluation {losses[0]:.3f} -> {losses[-1]:.3f}, {bits:.2f} bit per parameter and step, "
    f"weights {digest_all(model.named_parameters()).hex()}"
)
