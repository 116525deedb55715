"""Brute force in float64: explicit `d x d` matrices, one sort per block, one Python loop per row. Slow on purpose.

Nothing here is shared with the package, so that an error in one is seen in the other.
"""

import itertools
import math

import numpy as np
import torch


def largest(block, kept):
    """Indices of the entries of largest magnitude, ascending; the lowest index first among equals."""
    magnitudes = block.abs().tolist()
    return sorted(sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))[:kept])


def top_k(accumulator, density, block_size):
    """Indices that block-wise Top-k keeps of a flat vector."""
    kept = []
    for start in range(0, accumulator.numel(), block_size):
        block = accumulator[start : start + block_size]
        kept += [start + i for i in largest(block, math.ceil(density * len(block)))]
    return kept


class Naive:
    """EFCP's six lines over one flat float64 vector that holds all parameters. A subclass has the matrix.

    Args:
        thetas: Parameters, any dtype; copied.
        lr: A number, or one for each parameter.
        weight_decay: A number, or one for each parameter.
        l2: The weight decay is added to the gradient.
        density: Fraction kept of each block.
        block_size: Blocks are cut inside each parameter; None cuts none, over all parameters at once.
        value_dtype: What the window stores.
        num_grads: Capacity of the window.
        momentum: Heavy ball on the update.
        dense_gradient: The matrix is applied to the gradient instead of the row.
        rms: Root mean square of an update, tensor by tensor; None leaves it its length.
        **matrix: What the matrix needs.
    """

    def __init__(
        self, thetas, *, lr, num_grads, density=1.0, block_size=4096, value_dtype=torch.float32, momentum=0.0,
        weight_decay=0.0, l2=False, dense_gradient=False, rms=None, **matrix,
    ):  # fmt: skip
        self.shapes = [theta.shape for theta in thetas]
        self.thetas = [theta.detach().to(torch.float64).reshape(-1).clone() for theta in thetas]
        self.errors = [torch.zeros_like(theta) for theta in self.thetas]
        self.velocity = [torch.zeros_like(theta) for theta in self.thetas]
        count = len(thetas)
        self.lr = lr if isinstance(lr, list) else [lr] * count
        self.weight_decay = weight_decay if isinstance(weight_decay, list) else [weight_decay] * count
        self.num_grads, self.momentum, self.matrix = num_grads, momentum, matrix
        self.density, self.block_size, self.value_dtype = density, block_size, value_dtype
        self.l2, self.dense_gradient, self.rms = l2, dense_gradient, rms
        self.lengths = [[] for _ in thetas]
        self.rows = []

    def compress(self, accumulator):
        """The row that is stored for one parameter, dense."""
        row = torch.zeros_like(accumulator)
        kept = top_k(accumulator, self.density, self.block_size or max(1, accumulator.numel()))
        if self.value_dtype != torch.int8:
            row[kept] = accumulator[kept].to(self.value_dtype).to(torch.float64)
            return row
        full = accumulator.numel() // self.block_size * self.block_size
        share = max(1, 4096 // self.block_size) * self.block_size
        edges = sorted({*range(0, full, share), full, accumulator.numel()})
        for start, stop in itertools.pairwise(edges):
            at = [i for i in kept if start <= i < stop]
            scale = max(np.float32(accumulator[at].abs().max().item()) / np.float32(127), np.float32(2.0**-126))
            mantissa, exponent = math.frexp(scale)
            scale = math.ldexp(math.ceil(mantissa * 256), exponent - 8)  # bfloat16, rounded up
            levels = [round(float(np.float32(x / scale))) for x in accumulator[at].tolist()]
            row[at] = torch.tensor(levels, dtype=torch.float64) * scale
        return row

    def preconditioned(self):
        """What the matrix is applied to, unless it is the dense gradient."""
        return self.rows[-1]

    def update(self, x):
        """The inverse of the matrix, applied to x."""
        raise NotImplementedError

    def step(self, gradients):
        """One step; a gradient may be None."""
        sizes = [theta.numel() for theta in self.thetas]
        dense, accumulators = [], []
        for i, gradient in enumerate(gradients):
            g = torch.zeros(sizes[i]) if gradient is None else gradient.detach().float().reshape(-1)
            if self.l2:
                g = (g.double() + self.weight_decay[i] * self.thetas[i]).float()
            dense.append(g.double())
            # float32, as documented: which entries are kept and how they round hangs on the last bit.
            kept = torch.zeros_like(self.thetas[i])  # without a gradient nothing is pushed and the error stays
            accumulators.append(kept if gradient is None else (self.errors[i].float() + g).double())
        if self.block_size is None:
            rows = list(self.compress(torch.cat(accumulators)).split(sizes))
        else:
            rows = [self.compress(accumulator) for accumulator in accumulators]
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self.errors[i] = accumulators[i] - rows[i]
        self.rows = [*self.rows, torch.cat(rows)][-self.num_grads :]
        x = torch.cat(dense) if self.dense_gradient else self.preconditioned()
        update = self.update(x)
        for i, (gradient, part, own) in enumerate(zip(gradients, update.split(sizes), x.split(sizes), strict=True)):
            if gradient is None:
                continue
            if self.rms is not None:
                # What the matrix's rounding leaves of zero is zero.
                part = part if part.norm() > 1e-12 * update.norm() else 0 * part
                part = self.sized(i, part, dense[i], own)
            self.velocity[i] = self.momentum * self.velocity[i] + part
            if not self.l2:
                self.thetas[i] *= 1 - self.lr[i] * self.weight_decay[i]
            self.thetas[i] -= self.lr[i] * self.velocity[i]

    def sized(self, i, update, gradient, preconditioned):
        """The update with the wanted root mean square, times the row's length over that of gradients; long rows cut."""
        length, norm = float(gradient.norm()), float(update.norm())
        if length:
            self.lengths[i].append(length)
        if norm == 0.0 or not self.lengths[i]:
            return 0.0 * update
        weights = [0.999**age for age in reversed(range(len(self.lengths[i])))]
        mean = sum(w * x * x for w, x in zip(weights, self.lengths[i], strict=True)) / sum(weights)
        rms = self.rms * min(float(preconditioned.norm()) / math.sqrt(mean), math.sqrt(1000))
        update = update * rms * math.sqrt(update.numel()) / norm
        shape = self.shapes[i]
        for row in update.view(shape[0], -1) if len(shape) > 1 else []:
            row *= min(1.0, 3 * rms * math.sqrt(row.numel()) / max(float(row.norm()), 1e-300))
        return update

    def parameters(self):
        """The parameters in their shapes."""
        return [theta.view(shape) for theta, shape in zip(self.thetas, self.shapes, strict=True)]


class NaiveMFAC(Naive):
    """`(lambda I + (1/m) sum_i g_i g_i^T)^-1 x`; `present=True` divides by the number of rows."""

    def update(self, x):
        count = len(self.rows) if self.matrix.get("present") else self.num_grads
        damp = self.matrix.get("damp", 0.0)
        mean = sum(float(g @ g) for g in self.rows) / len(self.rows)
        damp += self.matrix.get("relative_damp", 0.0) * mean / count
        fisher = damp * torch.eye(x.numel(), dtype=torch.float64)
        for g in self.rows:
            fisher += torch.outer(g, g) / count
        return torch.linalg.solve(fisher, x)


class NaiveGGT(Naive):
    """`((sum_i w_i^2 g_i g_i^T)^(1/2) + eps I)^-1 x`, or of the momentum over the rows."""

    def preconditioned(self):
        beta1 = self.matrix.get("beta1", 0.0)
        return sum((1 - beta1) * beta1**age * g for age, g in enumerate(reversed(self.rows)))

    def update(self, x):
        mean = sum(float(g @ g) for g in self.rows) / len(self.rows)
        eps = self.matrix.get("eps", 0.0) + self.matrix.get("relative_eps", 0.0) * math.sqrt(mean)
        beta2 = self.matrix.get("beta2", 1.0)
        second = torch.zeros(x.numel(), x.numel(), dtype=torch.float64)
        for age, g in enumerate(reversed(self.rows)):
            second += beta2 ** (2 * age) * torch.outer(g, g)
        spectrum, vectors = torch.linalg.eigh(second)
        # Rounding of zero has a root of 1e-8 of the largest: the vector has nothing there, unless it is dense.
        spectrum = torch.where(spectrum > 1e-13 * spectrum[-1], spectrum, 0.0)
        return vectors @ ((vectors.T @ x) / (spectrum.sqrt() + eps))
