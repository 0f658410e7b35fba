"""Capture what optimizers send, for `muonwire bench codec`: gradients, momentum and weight changes of real training:
`make captured`, or

    python benchmarks/capture_updates.py benchmarks/data/updates.safetensors

Muon trains the text task's "micro" Llama; then one attention matrix, one MLP matrix and the embedding (which Adam trains) are
kept in float32, each as the gradient of one more batch, the momentum of all gradients (EMA, .95), and the change of the weight
over H = 5 more local steps (before minus after, as an update is subtracted).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from muonwire import recipes
from muonwire.tasks.text import TextSettings, TextTask
from muonwire.transport import SingleReplica

BETA = 0.95
INTERVAL = 5
ROLES = {
    "attention": "layers.3.self_attn.q_proj",
    "mlp": "layers.3.mlp.gate_proj",
    "embedding": "embed_tokens",
}


def capture(*, steps: int, lr: float, batch: int) -> dict[str, Tensor]:
    """Train, and keep what each role would send."""
    task = TextTask(TextSettings(model_size="micro", sequence=128, batch=batch))
    model = task.build_model(seed=0)
    optimizer = recipes.build("muon", model, lr=lr, transport=SingleReplica())
    chosen = {role: p for role, key in ROLES.items() for n, p in model.named_parameters() if key in n}
    momentum = {role: torch.zeros_like(p) for role, p in chosen.items()}
    captured: dict[str, Tensor] = {}
    for step in range(steps + INTERVAL):
        if step == steps:
            before = {role: p.detach().clone() for role, p in chosen.items()}
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(seed=0, step=step, rank=0, world_size=1))
        loss.backward()  # type: ignore[no-untyped-call]
        for role, p in chosen.items():
            assert p.grad is not None
            if step <= steps:
                momentum[role].lerp_(p.grad, 1 - BETA)
            if step == steps:
                captured[f"gradient {role}"] = p.grad.clone()
                captured[f"momentum {role}"] = momentum[role]
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return captured | {f"change {role}": before[role] - p.detach() for role, p in chosen.items()}


def main() -> None:
    """Capture, and say what was captured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captured = capture(steps=arguments.steps, lr=arguments.lr, batch=arguments.batch)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    options = f"--steps {arguments.steps} --lr {arguments.lr} --batch {arguments.batch}"
    command = f"python benchmarks/capture_updates.py {arguments.out} {options}"
    metadata = {"command": command, "torch": torch.__version__, "task": "text micro, King James, bytes"}
    save_file({name: t.contiguous() for name, t in captured.items()}, arguments.out, metadata=metadata)
    for name, t in captured.items():
        print(f"{name}: {tuple(t.shape)}, root mean square {float(t.square().mean().sqrt()):.2e}")


if __name__ == "__main__":
    main()
