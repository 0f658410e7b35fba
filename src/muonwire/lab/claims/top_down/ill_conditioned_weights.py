"""topdown.2: ill-conditioned weights slow training, by way of layer Jacobians and Gauss-Newton blocks.

The derivation is in docs/conditioning.md.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from muonwire import recipes
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.engine.check import Check, Row
from muonwire.lab.engine.claim import Claim, Setting
from muonwire.lab.engine.show import Pivot, Plot
from muonwire.lab.inputs.captured import hidden_matrices
from muonwire.lab.measures.chains import (
    ALL,
    BENT,
    DEPTH,
    MIDDLE,
    ONE,
    POLAR,
    STRAIGHT,
    TARGET,
    WIDTH,
    Course,
    chain,
    chain_blocks,
    rotation,
    steps_to_target,
)
from muonwire.lab.measures.gauss_newton import (
    condition_of,
    derived_blocks,
    largest_over,
    measured_block,
    with_condition,
    with_power,
)
from muonwire.lab.measures.matrices import fitted_power
from muonwire.tasks.text import TextSettings, TextTask

POSITIONS = {0: "the layer below", MIDDLE: "its own", 2: "the layer above"}
CONDITIONS = (1.0, 3.0, 10.0, 30.0)
QUICK_CONDITIONS = (1.0, 10.0)
# Powers that singular values of the real model's weights are raised to, the Frobenius norm kept.
POWERS = (0.0, 1.0, 3.0)
STEEP = 3.0
CHANGED = "layers.0.self_attn.v_proj"
BLOCKS = {
    CHANGED: "its own",
    "layers.0.self_attn.o_proj": "the next in its branch",
    "layers.1.self_attn.o_proj": "one in another branch",
}
# Rates that each recipe is given in training; the best one counts.
RATES = {"sgd": (0.03, 0.1, 0.3), "adamw": (0.0035, 0.007, 0.014), "muon": (0.007, 0.014, 0.028)}
SMOOTHED = 10
# Slower means a tenth more steps, or a tenth more condition.
MORE = 1.1


def _chain_rows(setting: Setting) -> list[Row]:
    generator = setting.generator()
    base = [rotation(generator) for _ in range(DEPTH)]
    # Columns of a semi-orthogonal matrix: E[x xᵀ] = I exactly, so that inputs add nothing to the condition.
    drawn = torch.randn(4 * WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.linalg.qr(drawn).Q * math.sqrt(4 * WIDTH)
    rows: list[Row] = []
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for condition in setting.pick(CONDITIONS, QUICK_CONDITIONS):
        weights = [with_condition(w, condition) if i == MIDDLE else w for i, w in enumerate(base)]
        for kind in (STRAIGHT, BENT):
            through = vmap(jacrev(lambda x, w=weights, k=kind: chain(w, x, kind=k)))(inputs)
            whole = float(torch.linalg.cond(through).mean())
            for layer, position in POSITIONS.items():
                measured, derived = chain_blocks(weights, inputs, kind=kind, layer=layer)
                found = condition_of(measured)
                rows.append(
                    {
                        "network": kind,
                        "weight condition": condition,
                        "block": position,
                        "series": f"{kind}: {position}",
                        "condition": found,
                        "derived": condition_of(derived),
                        "identity error": float((measured - derived).norm() / measured.norm()),
                        "Jacobian": whole,
                    }
                )
                points.setdefault((kind, position), []).append((condition, found))
    for (kind, position), pairs in points.items():
        rows.append({"exponent in": kind, "block": position, "exponent": round(fitted_power(pairs), 9)})
    return rows


COURSES = (
    Course(name="only the layer below", kind=STRAIGHT, changed=ONE, trained=(0,)),
    Course(name="only the layer above", kind=STRAIGHT, changed=ONE, trained=(2,)),
    Course(name="only the changed layer", kind=STRAIGHT, changed=ONE, trained=(MIDDLE,)),
    Course(name="all layers", kind=STRAIGHT, changed=ONE, trained=(0, 1, 2)),
    Course(name="all layers", kind=BENT, changed=ONE, trained=(0, 1, 2)),
    Course(name="all layers", kind=STRAIGHT, changed=ALL, trained=(0, 1, 2)),
    Course(name="all layers", kind=STRAIGHT, changed=ALL, trained=(0, 1, 2), step=POLAR),
)


def _course_rows(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    conditions = setting.pick(CONDITIONS, QUICK_CONDITIONS)
    for course in COURSES:
        high = 0.0 if course.step == POLAR else 1.0
        rates = torch.logspace(-8.0, high, setting.pick(19, 4), base=2.0, dtype=torch.float64)
        steps = steps_to_target(
            course,
            conditions,
            rates=rates,
            most=setting.pick(3000, 40),
            generator=setting.generator(stream=10),
        )
        for condition, count in zip(conditions, steps, strict=True):
            rows.append(
                {
                    "course": course.name,
                    "network": course.kind,
                    "changed": course.changed,
                    "step": course.step,
                    "series": f"{course.name}, {course.kind}, {course.changed}, {course.step}",
                    "weight condition": condition,
                    "steps": count,
                    "slowdown": count / steps[0],
                }
            )
    return rows


def small_llama(setting: Setting) -> nn.Module:
    """A byte-level Llama of which whole Gauss-Newton blocks fit: width 32, two layers, before training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = setting.pick(32, 8)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        # The fused kernels have no forward-mode derivative.
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


def train(model: nn.Module, task: TextTask, recipe: str, *, lr: float, steps: int, seed: int) -> list[float]:
    """Train, and give the loss at each step."""
    optimizer = recipes.build(recipe, model, lr=lr)
    losses = []
    for step in range(1, steps + 1):
        loss = task.loss(model, task.batch(seed=seed, step=step, rank=0, world_size=1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _real_rows(setting: Setting) -> list[Row]:
    length, sequences = setting.pick((16, 8), (6, 2))
    task = TextTask(TextSettings(model_size="pico", sequence=length, batch=sequences))
    model = small_llama(setting)
    train(model, task, "adamw", lr=0.005, steps=setting.pick(300, 2), seed=setting.seed)
    model.requires_grad_(False)
    tokens = task.batch(seed=setting.seed + 1, step=0, rank=0, world_size=1)["tokens"][:, :-1]
    rows: list[Row] = []
    for layer in BLOCKS:
        measured = measured_block(model, layer, tokens)
        for formula, derived in derived_blocks(model, layer, tokens).items():
            error = float((measured - derived).norm() / measured.norm())
            rows.append({"weight": layer, "formula": formula, "relative error": error})
        rows += _power_rows(model, layer, tokens, powers=setting.pick(POWERS, (0.0, STEEP)))
    return rows


def _power_rows(model: nn.Module, layer: str, tokens: Tensor, *, powers: Sequence[float]) -> list[Row]:
    """How the block of ``layer`` changes with the condition of ``CHANGED``."""
    place = BLOCKS[layer]
    weight = hidden_matrices(model)[CHANGED]
    original = weight.detach().clone()
    rows: list[Row] = []
    for power in powers:
        weight.data = with_power(original, power)
        block = measured_block(model, layer, tokens)
        rows.append(
            {
                "block of": place,
                "power": power,
                "of the weight": float(torch.linalg.cond(weight.detach().double())),
                "over the median": largest_over(block, 0.5),
                "over the upper quartile": largest_over(block, 0.75),
            }
        )
    weight.data = original
    flat = {row["power"]: row for row in rows}
    for column in ("over the median", "over the upper quartile"):
        steep, level = flat[STEEP][column], flat[0.0][column]
        assert isinstance(steep, float)
        assert isinstance(level, float)
        rows.append({"rise in": place, "measure": column, "rise": steep / level})
    return rows


def steps_needed(curves: Mapping[float, Sequence[Sequence[float]]]) -> dict[float, int]:
    """For each start: steps until the smoothed loss is where the slowest start's best run ends, at the best rate for it.

    Args:
        curves: by start, the losses of one run for each rate.
    """
    window = np.ones(SMOOTHED) / SMOOTHED
    smooth = {
        # A run that diverged is at no step near any target.
        start: [np.nan_to_num(np.convolve(run, window, mode="valid"), nan=np.inf) for run in runs]
        for start, runs in curves.items()
    }
    target = max(min(float(run.min()) for run in runs) for runs in smooth.values())
    return {
        start: min(int(np.argmax(run <= target)) + SMOOTHED for run in runs if run.min() <= target)
        for start, runs in smooth.items()
    }


def _training_rows(setting: Setting) -> list[Row]:
    task = TextTask(TextSettings(model_size="pico", sequence=setting.pick(64, 8), batch=setting.pick(8, 2)))
    starts = setting.pick((0.0, 1.0, STEEP), (0.0, STEEP))
    fresh = task.build_model(seed=setting.seed)
    rows: list[Row] = []
    for recipe, rates in RATES.items():
        curves: dict[float, list[list[float]]] = {}
        middle: dict[float, float] = {}
        for power in starts:
            for lr in setting.pick(rates, rates[1:2]):
                model = copy.deepcopy(fresh)
                found = []
                for weight in hidden_matrices(model).values():
                    weight.data = with_power(weight.detach(), power)
                    found.append(float(torch.linalg.cond(weight.detach())))
                steps = setting.pick(200, SMOOTHED + 2)
                losses = train(model, task, recipe, lr=lr, steps=steps, seed=setting.seed)
                curves.setdefault(power, []).append(losses)
                middle[power] = float(np.median(found))
        needed = steps_needed(curves)
        rows += [
            {
                "recipe": recipe,
                "power": power,
                "steep": power == STEEP,
                "median condition": middle[power],
                "loss": float(np.nanmin([np.mean(run[-SMOOTHED:]) for run in curves[power]])),
                "steps": needed[power],
                "slowdown": needed[power] / needed[0.0],
            }
            for power in starts
        ]
    return rows


def measure(setting: Setting) -> list[Row]:
    """Conditions and steps on made chains, the derivation on a real model, and training from starts of other conditions."""
    return _chain_rows(setting) + _course_rows(setting) + _real_rows(setting) + _training_rows(setting)


def _slower(setting: str, **select: str | bool | float) -> Check:
    return Check(
        name="it takes at least a tenth more steps",
        setting=setting,
        column="slowdown",
        select=select,
        at_least=MORE,
        possible=(0.0, math.inf),
        unit="times the steps",
    )


def _course_check(course: Course) -> Check:
    return _slower(
        f"training {course.name} of a {course.kind} chain by {course.step} steps, {course.changed} of "
        f"condition 10",
        course=course.name,
        network=course.kind,
        changed=course.changed,
        step=course.step,
        **{"weight condition": 10.0},
    )


def _rises(place: str) -> Check:
    return Check(
        name="raising a weight’s singular values from power 0 to 3 raises the block’s λ_max over its median "
        "by at least a tenth",
        setting=f"on a Llama’s Gauss–Newton block, {place}",
        column="rise",
        select={"rise in": place, "measure": "over the median"},
        at_least=MORE,
        possible=(0.0, math.inf),
        unit="times",
    )


CLAIM = Claim(
    id="topdown.2",
    note=NOTE,
    says="an ill-conditioned weight matrix slows training down, because the condition of the weight enters "
    "the Jacobian of the loss and gradient updates get fixated on one direction",
    quoted={"why it does": "it does because of the math"},
    question="Where does the condition of a weight enter: the layer Jacobians, and the Gauss–Newton block of "
    "which layer? And how many more steps does training take?",
    expected="The Gauss–Newton block of y = Wx is E[JᵀHJ ⊗ xxᵀ], J the derivative of the logits by y. W "
    "itself is in neither factor; x holds the weights below, J those above. So in a linear chain of which "
    "one weight has the condition κ, the blocks of all other layers have κ², and its own keeps 1: training "
    "the neighbours while it is held fixed takes steps like κ², training it alone no more than before, and "
    "training all together little more, since it mends itself first. In a residual network only the matrices "
    "of its own branch feel it. An update by the polar factor has condition 1 whatever the gradient’s, and "
    "suffers least.",
    measure=measure,
    checks=(
        *(_course_check(course) for course in COURSES),
        *(_rises(place) for place in BLOCKS.values()),
        *(
            _slower(f"in training a Llama with {recipe}, all hidden weights", recipe=recipe, steep=True)
            for recipe in RATES
        ),
    ),
    meaning={
        "confirmed": "Keep weights well conditioned: whatever is trained, and however, an ill-conditioned "
        "weight costs steps.",
        "refuted": "The condition of the weights at the start does not matter to how fast they are trained.",
        "depends": "What slows is an ill-conditioned weight that others have to work through: frozen, or as "
        "ill-conditioned as all. Its own learning it does not slow. So the weight’s condition is a matter of "
        "initialization and of frozen parts; what Muon makes well conditioned is the update, not the weight.",
    },
    tables=(
        Pivot(
            caption="A chain of three layers whose middle weight has the condition κ: condition of the "
            "Gauss–Newton block of each layer, measured and from the Kronecker factors, the relative error "
            "of the factored block, and the condition of the whole chain’s Jacobian",
            rows={"network": "Chain", "weight condition": "κ", "block": "Block of"},
            values={
                "condition": "Measured",
                "derived": "Derived",
                "identity error": "Relative error",
                "Jacobian": "Jacobian",
            },
        ),
        Pivot(
            caption="The power of κ in the block’s condition; derived for the linear chain: 2, 0, 2",
            rows={"exponent in": "Chain", "block": "Block of"},
            values={"exponent": "Exponent"},
        ),
        Pivot(
            caption=f"Steps until the loss is {TARGET:g} of what predicting zero has, at the best of the "
            f"rates (at most 3000), and over "
            "those at κ = 1",
            rows={
                "changed": "Of condition κ",
                "course": "Trained",
                "network": "Chain",
                "step": "Step",
                "weight condition": "κ",
            },
            values={"steps": "Steps", "slowdown": "Times"},
        ),
        Pivot(
            caption="The derivation on a trained byte-level Llama: relative error of the block by each "
            "formula against the block by differentiating with respect to the weight",
            rows={"weight": "Weight", "formula": "Formula"},
            values={"relative error": "Relative error"},
        ),
        Pivot(
            caption="Gauss–Newton blocks of that model with the singular values of layer 0’s v_proj raised "
            "to a power, at the same Frobenius norm. The blocks are rank-deficient or nearly so, hence the "
            "largest eigenvalue over a quantile",
            rows={"block of": "Block of", "power": "Power"},
            values={
                "of the weight": "Weight’s condition",
                "over the median": "λ_max/median",
                "over the upper quartile": "λ_max/upper quartile",
            },
        ),
        Pivot(
            caption="How much those rise from power 0 to power 3",
            rows={"rise in": "Block of", "measure": "λ_max"},
            values={"rise": "Times"},
        ),
        Pivot(
            caption="Training a byte-level Llama from hidden weights whose singular values were raised to a "
            "power: loss at the end, steps to where the slowest start ends, and over those from power 0; "
            "each at the best of three rates",
            rows={"recipe": "Recipe", "power": "Power"},
            values={
                "median condition": "Median condition",
                "loss": "Loss, nats",
                "steps": "Steps",
                "slowdown": "Times",
            },
        ),
    ),
    plots=(
        Plot(
            name="blocks",
            title="Condition of the Gauss–Newton blocks",
            how_to_read="A line of slope 2 is κ²; a level one does not feel the weight’s condition.",
            x=("weight condition", "condition κ of the middle weight"),
            y=("condition", "condition of the block"),
            series=("series", "Chain and block"),
            log_x=True,
            log_y=True,
        ),
        Plot(
            name="steps",
            title="Steps to a hundredth of the loss",
            how_to_read="Each at the best of its rates. Where a line is level, the condition costs nothing.",
            x=("weight condition", "condition κ"),
            y=("steps", "steps"),
            series=("series", "Trained"),
            log_x=True,
            log_y=True,
        ),
    ),
)
