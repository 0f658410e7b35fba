"""Chains of small square layers: where a weight's condition enters, and what it costs in steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from muonwire.lab import Row
from muonwire.lab.measures.gauss_newton import condition_of, gauss_newton, with_condition
from muonwire.lab.measures.matrices import fitted_power
from muonwire.polar import polar

WIDTH, DEPTH, MIDDLE = 8, 3, 1
POSITIONS = {0: "the layer below", MIDDLE: "its own", 2: "the layer above"}
STRAIGHT, BENT = "linear", "tanh"
# Whose condition is set; the others' is 1.
ONE, ALL = "the middle weight", "all three weights"
GRADIENT, POLAR = "gradient", "polar factor"
# Trained once the loss is this part of the loss of predicting zero.
TARGET = 0.01


def rotation(generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix of the chain's width."""
    made: Tensor = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    return made


def chain(weights: Sequence[Tensor], x: Tensor, *, kind: str) -> Tensor:
    """W₃ W₂ W₁ x, with tanh between the layers or without; x is (..., samples, width)."""
    for index, weight in enumerate(weights):
        x = x @ weight.mT
        if kind == BENT and index < len(weights) - 1:
            x = torch.tanh(x)
    return x


def chain_blocks(
    weights: Sequence[Tensor], inputs: Tensor, *, kind: str, layer: int
) -> tuple[Tensor, Tensor]:
    """A layer's Gauss-Newton block by differentiating with respect to its weight, and E[Jᵀ J] ⊗ E[x xᵀ] beside it."""

    def outputs(weight: Tensor, x: Tensor) -> Tensor:
        return chain([*weights[:layer], weight, *weights[layer + 1 :]], x, kind=kind)

    by_weight = vmap(jacrev(outputs), in_dims=(None, 0))(weights[layer], inputs)
    measured = gauss_newton(by_weight.flatten(2))
    reached = inputs
    for below in weights[:layer]:
        reached = torch.tanh(reached @ below.mT) if kind == BENT else reached @ below.mT

    def above(y: Tensor) -> Tensor:
        last = layer == len(weights) - 1
        return chain(weights[layer + 1 :], torch.tanh(y) if kind == BENT and not last else y, kind=kind)

    by_output = vmap(jacrev(above))(reached @ weights[layer].mT)
    second_moment = reached.mT @ reached / len(reached)
    return measured, torch.kron(gauss_newton(by_output), second_moment)


@dataclass(frozen=True, kw_only=True)
class Course:
    """One way of training the chain.

    Args:
        name: for the page.
        kind: "linear" or "tanh".
        changed: whose condition is set.
        trained: which layers learn.
        step: "gradient", or "polar factor" of the gradient.
    """

    name: str
    kind: str
    changed: str
    trained: tuple[int, ...]
    step: str = GRADIENT


COURSES = (
    Course(name="only the layer below", kind=STRAIGHT, changed=ONE, trained=(0,)),
    Course(name="only the layer above", kind=STRAIGHT, changed=ONE, trained=(2,)),
    Course(name="only the changed layer", kind=STRAIGHT, changed=ONE, trained=(MIDDLE,)),
    Course(name="all layers", kind=STRAIGHT, changed=ONE, trained=(0, 1, 2)),
    Course(name="all layers", kind=BENT, changed=ONE, trained=(0, 1, 2)),
    Course(name="all layers", kind=STRAIGHT, changed=ALL, trained=(0, 1, 2)),
    Course(name="all layers", kind=STRAIGHT, changed=ALL, trained=(0, 1, 2), step=POLAR),
)


def steps_to_target(
    course: Course, conditions: Sequence[float], *, rates: Tensor, most: int, generator: torch.Generator
) -> list[int]:
    """Steps until the loss is ``TARGET`` of predicting zero's, at the best of the rates, for each condition; ``most`` at most.

    All conditions and rates are trained at once, from the same singular vectors towards the same network of orthogonal weights.
    """
    base, wanted = ([rotation(generator) for _ in range(DEPTH)] for _ in range(2))
    inputs = math.sqrt(WIDTH) * torch.eye(WIDTH, dtype=torch.float64)
    answer = chain(wanted, inputs, kind=course.kind)
    weights = []
    for index, weight in enumerate(base):
        set_ones = course.changed == ALL or index == MIDDLE
        made = [with_condition(weight, c) if set_ones else weight for c in conditions]
        weights.append(torch.stack(made)[:, None].repeat(1, len(rates), 1, 1))
    for index in course.trained:
        weights[index].requires_grad_()
    learned = [weights[index] for index in course.trained]
    reached = torch.full((len(conditions),), most)
    size = answer.square().sum()
    for step in range(most):
        loss = (chain(weights, inputs, kind=course.kind) - answer).square().sum(dim=(-2, -1)) / (2 * WIDTH)
        done = (loss.detach() <= TARGET * size / (2 * WIDTH)).any(dim=1)
        reached = torch.where(done & (reached == most), step, reached)
        if bool((reached < most).all()):
            break
        gradients = torch.autograd.grad(loss.sum(), learned)
        with torch.no_grad():
            for weight, gradient in zip(learned, gradients, strict=True):
                taken = (
                    polar(gradient, method="svd", nonfinite="propagate") if course.step == POLAR else gradient
                )
                weight -= rates[:, None, None] * taken
    return [max(1, int(r)) for r in reached]


def block_rows(conditions: Sequence[float], *, generator: torch.Generator) -> Iterator[Row]:
    """Conditions of every layer's block in chains whose middle weight has each of the conditions, and the power of it in them."""
    base = [rotation(generator) for _ in range(DEPTH)]
    # Columns of a semi-orthogonal matrix: E[x xᵀ] = I exactly, so that inputs add nothing to the condition.
    drawn = torch.randn(4 * WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.linalg.qr(drawn).Q * math.sqrt(4 * WIDTH)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for condition in conditions:
        weights = [with_condition(w, condition) if i == MIDDLE else w for i, w in enumerate(base)]
        for kind in (STRAIGHT, BENT):
            through = vmap(jacrev(lambda x, w=weights, k=kind: chain(w, x, kind=k)))(inputs)
            whole = float(torch.linalg.cond(through).mean())
            for layer, position in POSITIONS.items():
                measured, derived = chain_blocks(weights, inputs, kind=kind, layer=layer)
                found = condition_of(measured)
                yield {
                    "network": kind,
                    "weight condition": condition,
                    "block": position,
                    "series": f"{kind}: {position}",
                    "condition": found,
                    "derived": condition_of(derived),
                    "identity error": float((measured - derived).norm() / measured.norm()),
                    "Jacobian": whole,
                }
                points.setdefault((kind, position), []).append((condition, found))
    for (kind, position), pairs in points.items():
        yield {"exponent in": kind, "block": position, "exponent": round(fitted_power(pairs), 9)}


def course_rows(
    conditions: Sequence[float], *, num_rates: int, most: int, generator: Callable[[], torch.Generator]
) -> Iterator[Row]:
    """Steps that each course takes at each condition; see ``steps_to_target``. Every course has its own equal generator."""
    for course in COURSES:
        high = 0.0 if course.step == POLAR else 1.0
        rates = torch.logspace(-8.0, high, num_rates, base=2.0, dtype=torch.float64)
        steps = steps_to_target(course, conditions, rates=rates, most=most, generator=generator())
        for condition, count in zip(conditions, steps, strict=True):
            yield {
                "course": course.name,
                "network": course.kind,
                "changed": course.changed,
                "step": course.step,
                "series": f"{course.name}, {course.kind}, {course.changed}, {course.step}",
                "weight condition": condition,
                "steps": count,
                "slowdown": count / steps[0],
            }
