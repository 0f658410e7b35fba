"""Gauss-Newton blocks of a loss for one weight: measured, and as the derivation in docs/conditioning.md has them."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from muonwire.spectra.edit import decompose, edited
from muonwire.spectra.edits import Flatten


def with_power(weight: Tensor, power: float) -> Tensor:
    """U Sᵖ Vᵀ at the Frobenius norm of U S Vᵀ: power 0 is a multiple of the polar factor, 1 the weight itself."""
    return edited("weight", decompose("weight", weight), [Flatten(power=power)]).product.to(weight)


def with_condition(weight: Tensor, condition: float) -> Tensor:
    """The singular vectors of a square weight with singular values from κ to 1, geometric, at its Frobenius norm."""
    left, values, right = torch.linalg.svd(weight)
    made = torch.logspace(math.log10(condition), 0, len(values), dtype=weight.dtype)
    changed: Tensor = (left * (made * (values.norm() / made.norm()))) @ right
    return changed


def gauss_newton(jacobian: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Mean over samples s of J_sᵀ H_s J_s, symmetric.

    Args:
        jacobian: (samples, outputs, parameters), of the outputs.
        curvature: (samples, outputs, outputs), the loss's second derivative at the outputs. Default: I, half the squared error.
    """
    curved = jacobian if curvature is None else curvature @ jacobian
    block = torch.einsum("sop,soq->pq", jacobian, curved) / jacobian.shape[0]
    return (block + block.mT) / 2


def condition_of(block: Tensor) -> float:
    """λ_max/λ_min of a positive definite block; ∞ where rounding has the least eigenvalue."""
    values = torch.linalg.eigvalsh(block)
    least = float(values[0])
    resolution = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    return float(values[-1]) / least if least > resolution else math.inf


def largest_over(block: Tensor, quantile: float) -> float:
    """λ_max over the quantile of the eigenvalues: a condition that rank-deficient blocks have too.

    A float32 Jacobian moves the root of an eigenvalue by ε √λ_max, so that eigenvalues are known down to ε² λ_max, which is the
    resolution of the float64 block as well; a smaller one counts as that.
    """
    values = torch.linalg.eigvalsh(block)
    resolution = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    return float(values[-1]) / max(float(values.quantile(quantile)), resolution)


def _curvature(logits: Tensor) -> Tensor:
    """diag(p) − p pᵀ at each position: the second derivative of the cross-entropy, whatever the target."""
    p = torch.softmax(logits.double(), dim=-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def measured_block(model: nn.Module, layer: str, tokens: Tensor) -> Tensor:
    """The Gauss-Newton block of the loss for one weight, by differentiating the logits with respect to that weight.

    Args:
        model: causal language model.
        layer: short name of the weight, as ``hidden_matrices`` has it.
        tokens: (sequences, length).

    Returns:
        (parameters, parameters), float64; the weight row by row.
    """
    name = f"model.{layer}.weight"
    weight = dict(model.named_parameters())[name].detach()
    total = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64)
    for sequence in tokens:

        def logits(w: Tensor, ids: Tensor = sequence) -> Tensor:
            out: Tensor = functional_call(model, {name: w}, kwargs={"input_ids": ids[None]}).logits[0]
            return out

        jacobian = jacfwd(logits)(weight).flatten(2).double()
        total += gauss_newton(jacobian, _curvature(logits(weight).detach()))
    return total / len(tokens)


def derived_blocks(model: nn.Module, layer: str, tokens: Tensor) -> dict[str, Tensor]:
    """The same block by the derivation, from the layer's inputs x_t and J_st, the derivative of logits s by the layer's output t.

    Returns:
        By formula: "all positions", mean over s of Σ_tu (J_stᵀ H_s J_su) ⊗ (x_t x_uᵀ); "own position", its terms t = u = s alone;
        "factored", mean(J_ssᵀ H_s J_ss) ⊗ mean(x_s x_sᵀ), which is K-FAC's.
    """
    module = model.get_submodule(f"model.{layer}")
    made: dict[str, Tensor] = {}
    moment = sensitivity = torch.zeros((), dtype=torch.float64)
    for sequence in tokens:
        seen: list[Tensor] = []

        def logits(shift: Tensor, ids: Tensor = sequence, seen: list[Tensor] = seen) -> Tensor:
            def moved(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                seen.append(args[0])
                return out + shift

            handle = module.register_forward_hook(moved)
            try:
                out: Tensor = model(input_ids=ids[None]).logits[0]
            finally:
                handle.remove()
            return out

        shift = torch.zeros(len(sequence), module.get_parameter("weight").shape[0])
        curvature = _curvature(logits(shift).detach())
        x = seen[0][0].detach().double()
        by_output = jacfwd(logits)(shift).double()
        own = torch.diagonal(by_output, dim1=0, dim2=2).permute(2, 0, 1)
        parts = {
            "all positions": gauss_newton(torch.einsum("scto,ti->scoi", by_output, x).flatten(2), curvature),
            "own position": gauss_newton(torch.einsum("sco,si->scoi", own, x).flatten(2), curvature),
        }
        for formula, part in parts.items():
            made[formula] = made.get(formula, torch.zeros_like(part)) + part / len(tokens)
        moment = moment + x.mT @ x / len(x) / len(tokens)
        sensitivity = sensitivity + gauss_newton(own, curvature) / len(tokens)
    return {**made, "factored": torch.kron(sensitivity, moment)}
