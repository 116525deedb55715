"""Small problems whose gradient depends on where the parameters are, for float32 and float64 alike."""

import torch


class Regression:
    """Least squares through a tiny two-layer network, on a fixed sequence of mini-batches from a teacher.

    Its parameters have awkward shapes: a scalar, a vector, matrices that no block size divides.
    """

    def __init__(self, seed=0, width=7, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(width, 5), (width,), (3, width), ()]
        self.start = [scale * torch.randn(shape, generator=generator) for shape in shapes]
        self.inputs = torch.randn(64, 16, 5, generator=generator)
        teacher = torch.randn(5, 3, generator=generator)
        noise = torch.randn(64, 16, 3, generator=generator)
        self.targets = torch.tanh(self.inputs @ teacher) + 0.1 * noise

    def parameters(self, dtype=torch.float32):
        """Fresh leaves at the start."""
        return [torch.nn.Parameter(start.to(dtype, copy=True)) for start in self.start]

    def loss(self, thetas, step):
        """The loss of the mini-batch of a step."""
        first, bias, second, scale = thetas
        x = self.inputs[step % 64].to(first.dtype)
        y = self.targets[step % 64].to(first.dtype)
        return ((torch.tanh(x @ first.T + bias) @ second.T * scale - y) ** 2).mean()

    def gradients(self, thetas, step):
        """Gradients at any point, in that point's dtype."""
        leaves = [theta.detach().clone().requires_grad_() for theta in thetas]
        return list(torch.autograd.grad(self.loss(leaves, step), leaves))


def set_gradients(params, gradients):
    """Give every parameter its gradient, None included."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.detach().to(param.dtype).clone()


def step_beside(params, optimizer, twins, twin, gradients):
    """Step parameters, and float32 copies of them with another optimizer, by the same gradients; both end alike."""
    with torch.no_grad():
        for param, other in zip(params, twins, strict=True):
            other.copy_(param)
    for targets, stepped in ((params, optimizer), (twins, twin)):
        set_gradients(targets, gradients)
        stepped.step()
    assert all(torch.equal(p, other.to(p.dtype)) for p, other in zip(params, twins, strict=True))


def flat(tensors):
    """All tensors as one float64 vector."""
    return torch.cat([tensor.detach().to(torch.float64).reshape(-1) for tensor in tensors])


def distance(ours, theirs, start):
    """`|ours - theirs|` over the distance that theirs moved, and that distance over `|start|`."""
    moved = (flat(theirs) - flat(start)).norm()
    return ((flat(ours) - flat(theirs)).norm() / moved).item(), (moved / flat(start).norm()).item()
