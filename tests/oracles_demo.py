"""One step of DeMo and of Psyche's DisTrO, chunk by chunk in NumPy's float64, after their descriptions and without the library.

DeMo (arXiv 2411.19870, algorithm 1): p ← p (1 − lr · wd); δ ← decay · δ + lr · g; an orthonormal DCT-II of each chunk, whose sides
are the largest divisors up to ``chunk``; the k largest coefficients of each chunk are sent, in full precision, and subtracted from
δ; the mean of each coefficient over those who sent it; inverse DCT; p ← p − lr · sign. A vector is chunked in its one dimension; a
tensor of more than two is seen as its first dimension by all others.

Psyche sends the signs of the coefficients alone, decodes them as ±1, and subtracts their full values from δ. (Its look-ahead by the
last update and its delay of one round belong to the optimizer around the exchange, and are not here.)
"""

import math
from dataclasses import dataclass

import numpy as np


def side(size, limit):
    return max(d for d in range(1, limit + 1) if size % d == 0)


def cosines(size):
    rows = []
    for k in range(size):
        root = math.sqrt((1 if k == 0 else 2) / size)
        rows.append([root * math.cos(math.pi * (2 * i + 1) * k / (2 * size)) for i in range(size)])
    return np.array(rows)


def as_matrix(array):
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


@dataclass
class Step:
    """What one step gave for one tensor.

    weight, update: after the step; the decoded mean before its sign.
    deltas: each replica's δ after the subtraction.
    sent: (replica, chunk) -> {index in the chunk: coefficient}.
    gap: over all replicas and chunks, the least distance between the last coefficient sent and the first one not, as a share of
        the chunk's norm.
    peak: the largest norm of a chunk of any δ before the subtraction.
    """

    weight: np.ndarray
    update: np.ndarray
    deltas: list
    sent: dict
    gap: float
    peak: float


def step(weight, gradients, deltas, *, lr, decay, weight_decay, k, chunk, signs_only):
    matrix = as_matrix(weight)
    height, width = side(matrix.shape[0], chunk), side(matrix.shape[1], chunk)
    left, right = cosines(height), cosines(width)
    corners = [(i, j) for i in range(0, matrix.shape[0], height) for j in range(0, matrix.shape[1], width)]
    sent, gap, peak, after = {}, math.inf, 0.0, []
    for replica, (gradient, delta) in enumerate(zip(gradients, deltas, strict=True)):
        delta = decay * as_matrix(delta) + lr * as_matrix(gradient)
        for number, (i, j) in enumerate(corners):
            block = delta[i : i + height, j : j + width]
            coefficients = (left @ block @ right.T).reshape(-1)
            norm = float(np.linalg.norm(block))
            peak = max(peak, norm)
            order = sorted(range(coefficients.size), key=lambda n: -abs(coefficients[n]))
            chosen = order[:k]
            if len(order) > k:
                gap = min(gap, (abs(coefficients[order[k - 1]]) - abs(coefficients[order[k]])) / norm)
            sent[replica, number] = {n: float(coefficients[n]) for n in chosen}
            taken = np.zeros(coefficients.size)
            taken[chosen] = coefficients[chosen]
            block -= left.T @ taken.reshape(height, width) @ right
        after.append(delta.reshape(weight.shape))
    update = np.zeros_like(matrix)
    for number, (i, j) in enumerate(corners):
        mean = np.zeros(height * width)
        for n in range(mean.size):
            values = [
                sent[replica, number][n] for replica in range(len(deltas)) if n in sent[replica, number]
            ]
            if signs_only:
                values = [1.0 if v >= 0 else -1.0 for v in values]
            if values:
                mean[n] = sum(values) / len(values)
        update[i : i + height, j : j + width] = left.T @ mean.reshape(height, width) @ right
    update = update.reshape(weight.shape)
    moved = weight * (1 - lr * weight_decay) - lr * np.sign(update)
    return Step(weight=moved, update=update, deltas=after, sent=sent, gap=gap, peak=peak)


def largest_rounding(shape, *, chunk, unit):
    """Bound on ‖computed − exact‖ / ‖chunk‖ after a DCT of a chunk and back, in arithmetic of unit roundoff ``unit``.

    A product of the basis A (n × n) and a chunk D errs by at most n · unit · |A| |D| in each entry, so by n^1.5 · unit · ‖D‖ in
    Frobenius' norm, since ‖|A|‖ ≤ √n; entries of A that are off by 4 units of √(2 / n) add 4 √2 √n · unit · ‖D‖. There is one
    product for each side, forth and back. Forming δ takes three roundings, and subtracting one.
    """
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    sides = (side(rows, chunk), side(columns, chunk))
    return unit * (2 * sum(n**1.5 + 4 * math.sqrt(2 * n) for n in sides) + 4)
