"""Problems whose conditioning is set: a convex one with a spectrum that is prescribed, and a deep narrow network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

_DENSITY = 0.1  # of the features before they are turned


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised.

    Args:
        model: the parameters that it starts from.
        inputs: the examples, `(n, d)`.
        loss: of the model's outputs and the numbers of the examples, a scalar.
        floor: the least value of the loss over all examples.
    """

    model: nn.Module
    inputs: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    floor: float


def logistic(condition: float, rotated: bool, examples: int, features: int, seed: int) -> Problem:
    """Logistic regression on sparse features, `x = Q S z`, whose labels all directions decide alike.

    `z` is sparse with the covariance `I`, the squares of `S` fall geometrically from 1 to `1 / condition`, and the
    label is 1 with the probability `sigmoid(u^T z)`: the weights `Q S^-1 u` are the longer, the weaker a direction is.
    With a random rotation `Q`, every coordinate has much the same variance and no diagonal metric mends that.

    Args:
        condition: the condition number of the features' covariance, at least 1.
        rotated: whether `Q` is a random rotation, or the identity.
        examples: their number.
        features: their number `d`.
        seed: of the data.

    Returns:
        The problem, started at zero weights, its floor found by Newton's method in float64.

    Raises:
        ValueError: if `condition` is below 1.
    """
    if not condition >= 1.0:
        raise ValueError(f"a condition number is at least 1: {condition}")
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    present = torch.rand(examples, features, **kind) < _DENSITY  # type: ignore[call-overload]
    latent = torch.randn(examples, features, **kind) * present / math.sqrt(_DENSITY)  # type: ignore[call-overload]
    turn = torch.linalg.qr(torch.randn(features, features, **kind))[0]  # type: ignore[call-overload]
    true = torch.randn(features, **kind) * 2.0 / math.sqrt(features)  # type: ignore[call-overload]
    labels = (torch.rand(examples, **kind) < torch.sigmoid(latent @ true)).double()  # type: ignore[call-overload]
    scales = torch.logspace(0.0, -0.5 * math.log10(condition), features, dtype=torch.float64)
    inputs = latent * scales
    if rotated:
        inputs = inputs @ turn.T
    model = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(model.weight)
    floor = newton(latent, labels)  # the weights are free: the floor does not depend on Q and S
    targets = labels.float()

    def loss(outputs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(outputs.squeeze(1), targets[chosen])

    return Problem(model, inputs.float(), loss, floor)


def newton(inputs: torch.Tensor, labels: torch.Tensor, steps: int = 50) -> float:
    """The least logistic loss, `min_w mean log(1 + exp(-y w^T x))`.

    Args:
        inputs: the examples, `(n, d)`, in float64.
        labels: 0 or 1 for each.
        steps: of Newton's method.

    Returns:
        The loss.

    Raises:
        ValueError: if the gradient is not zero in the end, as on labels that a plane separates.
    """
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)

    def loss(at: torch.Tensor) -> float:
        return float(binary_cross_entropy_with_logits(inputs @ at, labels))

    for _ in range(steps):
        chances = torch.sigmoid(inputs @ weights)
        curvature = (inputs.T * (chances * (1.0 - chances))) @ inputs / len(labels)
        gradient = inputs.T @ (chances - labels) / len(labels)
        step, length = torch.linalg.lstsq(curvature, gradient[:, None]).solution[:, 0], 1.0
        while loss(weights - length * step) > loss(weights) + 1e-12 and length > 1e-6:
            length /= 2.0  # far from the minimum a whole step may lead uphill
        weights = weights - length * step
    gradient = inputs.T @ (torch.sigmoid(inputs @ weights) - labels) / len(labels)
    if not float(gradient.norm()) < 1e-9:
        raise ValueError(
            f"Newton's method ended at a gradient of {float(gradient.norm()):.1e}: the labels are separable, or nearly "
            "so; take more examples for each feature"
        )
    return loss(weights)


def network(depth: int, examples: int, width: int, seed: int) -> Problem:
    """A deep narrow network without normalisation, `tanh` after each layer, that learns what a shallow one computes.

    Args:
        depth: hidden layers, at least 1.
        examples: their number.
        width: of every layer, and of the inputs.
        seed: of data, teacher and start.

    Returns:
        The problem: the mean squared error over the variance of the targets, whose floor is taken to be 0.

    Raises:
        ValueError: if `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"a network has at least one hidden layer: {depth}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = torch.randn(examples, width)
        teacher = _layers(2, width, gain=2.0)
        model = _layers(depth, width, gain=1.0)
    with torch.no_grad():
        targets = teacher(inputs).squeeze(1)
    targets = (targets - targets.mean()) / targets.std()

    def loss(outputs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return mse_loss(outputs.squeeze(1), targets[chosen])

    return Problem(model, inputs, loss, 0.0)


def _layers(depth: int, width: int, gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.xavier_normal_(linear.weight, gain)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 1))
