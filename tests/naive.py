"""Brute force in float64: explicit `d x d` matrices, one sort per block, one Python loop per row. Slow on purpose.

Nothing here is shared with the package, so that an error in one is seen in the other.
"""

import math

import torch


def top_k(accumulator, density, block_size):
    """Indices that block-wise Top-k keeps of a flat vector: by magnitude, the lowest index first among equals."""
    kept = []
    for start in range(0, accumulator.numel(), block_size):
        block = accumulator[start : start + block_size].abs().tolist()
        ranked = sorted(range(len(block)), key=lambda i: (-block[i], i))
        kept += [start + i for i in sorted(ranked[: math.ceil(density * len(block))])]
    return kept


def mfac_update(rows, row, num_grads, damp):
    """`(lambda I + (1/m) sum_i g_i g_i^T)^-1 row`, with the matrix written out."""
    fisher = damp * torch.eye(row.numel(), dtype=torch.float64)
    for g in rows:
        fisher += torch.outer(g, g) / num_grads
    return torch.linalg.solve(fisher, row)


class NaiveMFAC:
    """EFCP's six lines over one flat float64 vector that holds all parameters.

    Args:
        thetas: Parameters, any dtype; copied.
        lr: A number, or one for each parameter.
        weight_decay: A number, or one for each parameter.
        density: Fraction kept of each block.
        block_size: Blocks are cut inside each parameter.
        value_dtype: What the window stores.
        num_grads: Capacity of the window.
        damp: Dampening.
        momentum: Heavy ball on the update.
    """

    def __init__(
        self, thetas, *, lr, num_grads, damp, density=1.0, block_size=4096, value_dtype=torch.float32, momentum=0.0,
        weight_decay=0.0,
    ):  # fmt: skip
        self.shapes = [theta.shape for theta in thetas]
        self.thetas = [theta.detach().to(torch.float64).reshape(-1).clone() for theta in thetas]
        self.errors = [torch.zeros_like(theta) for theta in self.thetas]
        self.velocity = [torch.zeros_like(theta) for theta in self.thetas]
        count = len(thetas)
        self.lr = lr if isinstance(lr, list) else [lr] * count
        self.weight_decay = weight_decay if isinstance(weight_decay, list) else [weight_decay] * count
        self.num_grads, self.damp, self.momentum = num_grads, damp, momentum
        self.density, self.block_size, self.value_dtype = density, block_size, value_dtype
        self.rows = []

    def compress(self, accumulator):
        """The row that is stored for one parameter, dense."""
        row = torch.zeros_like(accumulator)
        kept = top_k(accumulator, self.density, self.block_size)
        row[kept] = accumulator[kept].to(self.value_dtype).to(torch.float64)
        return row

    def step(self, gradients):
        """One step; a gradient may be None."""
        row = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                row.append(torch.zeros_like(self.thetas[i]))
                continue
            # float32, as documented: which entries are kept and how they round hangs on the last bit.
            accumulator = self.errors[i].float() + gradient.detach().float().reshape(-1)
            row.append(self.compress(accumulator.double()))
            self.errors[i] = accumulator.double() - row[-1]
        self.rows = [*self.rows, torch.cat(row)][-self.num_grads :]
        update = mfac_update(self.rows, self.rows[-1], self.num_grads, self.damp)
        parts = update.split([theta.numel() for theta in self.thetas])
        for i, (gradient, part) in enumerate(zip(gradients, parts, strict=True)):
            if gradient is None:
                continue
            self.velocity[i] = self.momentum * self.velocity[i] + part
            self.thetas[i] *= 1 - self.lr[i] * self.weight_decay[i]
            self.thetas[i] -= self.lr[i] * self.velocity[i]

    def parameters(self):
        """The parameters in their shapes."""
        return [theta.view(shape) for theta, shape in zip(self.thetas, self.shapes, strict=True)]
