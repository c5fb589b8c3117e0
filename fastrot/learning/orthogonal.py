"""Descent on orthogonal matrices, which stay orthogonal to the last digit.

Adam (Kingma & Ba, arXiv 1412.6980) on the skew-symmetric part of the gradient, moments in the
tangent space at the identity; steps by the Cayley transform, solved exactly in float64 (Li et al.,
"Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform", arXiv
2002.01113, solve by iteration, which drifts).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BETAS = 0.9, 0.99
WARM_UP = 10
"""Steps until the learning rate is reached; it falls as half a cosine after that."""


def cayley(skew: Tensor) -> Tensor:
    """``(I - A/2)⁻¹ (I + A/2)``, orthogonal for a skew-symmetric ``A``, ``(…, n, n)``."""
    half = skew / 2
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(one - half, one + half)


def polished(q: Tensor) -> Tensor:
    """The nearest orthogonal matrix, by three steps of Newton and Schulz; ``q`` is nearly one."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for _ in range(3):
        q = q @ (1.5 * one - 0.5 * q.mT @ q)
    return q


def defect(q: Tensor) -> float:
    """The largest entry of ``|QᵀQ - I|``."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return float((q.mT @ q - one).abs().max())


class Walk:
    """One orthogonal matrix on its way, from the identity on.

    Args:
        size: its order.
        rate: the most that an entry of the skew-symmetric step moves, in radians.
        fixes_ones: keep the all-ones vector where it is.
    """

    def __init__(self, size: int, rate: float, *, fixes_ones: bool = False) -> None:
        self.rate, self.fixes_ones = rate, fixes_ones
        self.q = torch.eye(size, dtype=torch.float64)
        self.first = torch.zeros_like(self.q)
        self.second = torch.zeros_like(self.q)

    def turn(self, gradient: Tensor, step: int, steps: int) -> None:
        """Go one step of so many down a gradient, ``(size, size)``."""
        turn = self.q.mT @ gradient.double()
        turn = (turn - turn.mT) / 2
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * turn
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * turn.square()
        mean, spread = (
            moment / (1 - beta ** (step + 1))
            for moment, beta in zip((self.first, self.second), BETAS, strict=True)
        )
        move = -_scheduled(self.rate, step, steps) * mean / (spread.sqrt() + 1e-12)
        self.q = self.q @ cayley(_without_ones(move) if self.fixes_ones else move)


def descend(
    walks: Sequence[Walk],
    loss: Callable[[Sequence[Tensor]], Tensor],
    steps: int,
    done: Callable[[list[float]], object] | None = None,
    history: list[float] | None = None,
) -> list[float]:
    """Let orthogonal matrices walk to where a loss of them all is small.

    Args:
        walks: the matrices, which are moved.
        loss: of the matrices in float32; may draw other samples in every step.
        steps: how many.
        done: called after each step with the loss of every step so far.
        history: the steps that the matrices have gone already; grows.

    Returns:
        The loss of every step.
    """
    history = [] if history is None else history
    for step in range(len(history), steps):
        leaves = [walk.q.float().requires_grad_() for walk in walks]
        with torch.enable_grad():
            value = loss(leaves)
            gradients = torch.autograd.grad(value, leaves)
        history.append(value.item())
        for walk, gradient in zip(walks, gradients, strict=True):
            walk.turn(gradient, step, steps)
        if done is not None:
            done(history)
    return history


def _scheduled(rate: float, step: int, steps: int) -> float:
    if step < WARM_UP:
        return rate * (step + 1) / (WARM_UP + 1)
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def _without_ones(skew: Tensor) -> Tensor:
    """The same on the complement of the ones vector, of which it makes nothing."""
    centred = skew - skew.mean(-1, keepdim=True)
    return centred - centred.mean(-2, keepdim=True)
