"""topdown.2: ill-conditioned weights slow training, by way of layer Jacobians and Gauss-Newton blocks.

The derivation is in docs/conditioning.md.
"""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.captured import hidden_matrices
from muonwire.lab.measures.chains import COURSES, TARGET, Course, block_rows, course_rows
from muonwire.lab.measures.gauss_newton import derived_blocks, largest_over, measured_block, with_power
from muonwire.lab.measures.small_llama import SMOOTHED, small_llama, steps_needed, train
from muonwire.tasks.text import TextSettings, TextTask

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
# Slower means a tenth more steps, or a tenth more condition.
MORE = 1.1


def _real_rows(setting: Setting) -> Iterator[Row]:
    length, sequences = setting.pick((16, 8), (6, 2))
    task = TextTask(TextSettings(model_size="pico", sequence=length, batch=sequences))
    model = small_llama(width=setting.pick(32, 8), seed=setting.seed)
    train(model, task, "adamw", lr=0.005, steps=setting.pick(300, 2), seed=setting.seed)
    model.requires_grad_(False)
    tokens = task.batch(seed=setting.seed + 1, step=0, rank=0, world_size=1)["tokens"][:, :-1]
    for layer in BLOCKS:
        measured = measured_block(model, layer, tokens)
        for formula, derived in derived_blocks(model, layer, tokens).items():
            error = float((measured - derived).norm() / measured.norm())
            yield {"weight": layer, "formula": formula, "relative error": error}
        yield from _power_rows(model, layer, tokens, powers=setting.pick(POWERS, (0.0, STEEP)))


def _power_rows(model: nn.Module, layer: str, tokens: Tensor, *, powers: Sequence[float]) -> Iterator[Row]:
    """How the block of ``layer`` changes with the condition of ``CHANGED``."""
    place = BLOCKS[layer]
    weight = hidden_matrices(model)[CHANGED]
    original = weight.detach().clone()
    found: dict[float, dict[str, float]] = {}
    for power in powers:
        weight.data = with_power(original, power)
        block = measured_block(model, layer, tokens)
        found[power] = {
            "over the median": largest_over(block, 0.5),
            "over the upper quartile": largest_over(block, 0.75),
        }
        condition = float(torch.linalg.cond(weight.detach().double()))
        yield {"block of": place, "power": power, "of the weight": condition, **found[power]}
    weight.data = original
    for column, level in found[0.0].items():
        yield {"rise in": place, "measure": column, "rise": found[STEEP][column] / level}


def _training_rows(setting: Setting) -> Iterator[Row]:
    task = TextTask(TextSettings(model_size="pico", sequence=setting.pick(64, 8), batch=setting.pick(8, 2)))
    starts = setting.pick((0.0, 1.0, STEEP), (0.0, STEEP))
    fresh = task.build_model(seed=setting.seed)
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
        for power in starts:
            yield {
                "recipe": recipe,
                "power": power,
                "steep": power == STEEP,
                "median condition": middle[power],
                "loss": float(np.nanmin([np.mean(run[-SMOOTHED:]) for run in curves[power]])),
                "steps": needed[power],
                "slowdown": needed[power] / needed[0.0],
            }


def measure(setting: Setting) -> Iterator[Row]:
    """Conditions and steps on made chains, the derivation on a real model, and training from starts of other conditions."""
    conditions = setting.pick(CONDITIONS, QUICK_CONDITIONS)
    yield from block_rows(conditions, generator=setting.generator())
    yield from course_rows(
        conditions,
        num_rates=setting.pick(19, 4),
        most=setting.pick(3000, 40),
        generator=lambda: setting.generator(stream=10),
    )
    yield from _real_rows(setting)
    yield from _training_rows(setting)


def _slower(setting: str, reading: Reading | None, **select: str | bool | float) -> Check:
    return Check(
        name="it takes at least a tenth more steps",
        setting=setting,
        column="slowdown",
        select=select,
        at_least=MORE,
        unit="times the steps",
        reading=reading,
    )


# How the answer says what holds and what fails, and where: of some of COURSES by their place there, and of RATES.
_LAYER = (
    "a fixed weight of condition 10 slows the layer",
    "a fixed weight of condition 10 does not slow the layer",
)
_OWN = ("it slows its own training", "it does not slow its own training")
_THREE = ("three such weights slow training", "three such weights do not slow training")
_LLAMA = ("ill-conditioned weights slow a Llama", "ill-conditioned weights do not slow a Llama")
WORDS: dict[int | str, tuple[tuple[str, str], str]] = {
    0: (_LAYER, "below it"),
    2: (_OWN, ""),
    5: (_THREE, "by gradients"),
    6: (_THREE, "by polar factors"),
    "adamw": (_LLAMA, "with AdamW"),
    "muon": (_LLAMA, "with Muon"),
}


def _reading(of: int | str) -> Reading | None:
    if of not in WORDS:
        return None
    (holds, fails), where = WORDS[of]
    return Reading(
        holds=holds, fails=fails, by="{mean} times the steps" if of == 0 else "{mean} times", where=where
    )


def _course_check(place: int, course: Course) -> Check:
    return _slower(
        f"training {course.name} of a {course.kind} chain by {course.step} steps, {course.changed} of condition 10",
        _reading(place),
        course=course.name,
        network=course.kind,
        changed=course.changed,
        step=course.step,
        **{"weight condition": 10.0},
    )


def _rises(place: str) -> Check:
    return Check(
        name="raising a weight’s singular values from power 0 to 3 raises the block’s λ_max over its median by at least a tenth",
        setting=f"on a Llama’s Gauss–Newton block, {place}",
        column="rise",
        select={"rise in": place, "measure": "over the median"},
        at_least=MORE,
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
    expected="The Gauss–Newton block of y = Wx is E[JᵀHJ ⊗ xxᵀ], J the derivative of the logits by y. W itself is in neither "
    "factor; x holds the weights below, J those above. So in a linear chain of which one weight has the condition κ, the blocks "
    "of all other layers have κ², and its own keeps 1: training the neighbours while it is held fixed takes steps like κ², "
    "training it alone no more than before, training all little more. In a residual network only the matrices of its own branch "
    "feel it. An update by the polar factor has condition 1 whatever the gradient’s, and suffers least.",
    measure=measure,
    checks=(
        *(_course_check(place, course) for place, course in enumerate(COURSES)),
        *(_rises(place) for place in BLOCKS.values()),
        *(
            _slower(
                f"in training a Llama with {recipe}, all hidden weights",
                _reading(recipe),
                recipe=recipe,
                steep=True,
            )
            for recipe in RATES
        ),
    ),
    meaning={
        "confirmed": "Keep weights well conditioned: whatever is trained, and however, an ill-conditioned weight costs steps.",
        "refuted": "The condition of the weights at the start does not matter to how fast they are trained.",
        "depends": "Mind the condition of weights at initialization and in frozen parts: layers that have to work through an "
        "ill-conditioned weight are slowed, its own learning is not. What Muon makes well conditioned is the update.",
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
            caption=f"Steps until the loss is {TARGET:g} of what predicting zero has, at the best of the rates (at most 3000), "
            f"and over those at κ = 1",
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
            caption="Gauss–Newton blocks of that model with the singular values of layer 0’s v_proj raised to a power, at the "
            "same Frobenius norm. The blocks are rank-deficient or nearly so, hence the largest eigenvalue over a quantile",
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
            caption="Training a byte-level Llama from hidden weights whose singular values were raised to a power: loss at the "
            "end, steps to where the slowest start ends, and over those from power 0; each at the best of three rates",
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
