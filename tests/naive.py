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
        metric: "adam" or "factored" for AdamW's metric.
        moment: In a metric, decay of the first moment, to which the matrix is then applied; of one over the rows,
            unless `dense_gradient`.
        layers: A matrix for each parameter.
        **matrix: What the matrix needs.
    """

    def __init__(
        self, thetas, *, lr, num_grads, density=1.0, block_size=4096, value_dtype=torch.float32, momentum=0.0,
        weight_decay=0.0, l2=False, dense_gradient=False, metric=None, moment=0.0, layers=False, **matrix,
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
        self.l2, self.dense_gradient, self.layers = l2, dense_gradient, layers
        self.metric, self.moment = metric, moment
        self.seen = [[] for _ in thetas]  # gradients of each parameter, in a metric
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
        """What the matrix is applied to, unless it is the dense gradient: the newest row, or a mean of the rows."""
        weights = [self.moment**age for age in reversed(range(len(self.rows)))]  # 0^0 is 1
        return sum(w * row for w, row in zip(weights, self.rows, strict=True)) / sum(weights)

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
            if self.metric and gradient is not None:
                self.seen[i].append(g.double())
                g = (g.double() * self.whitening(i)).float()
            whole = gradient is not None and self.moment and self.dense_gradient
            dense.append(self.first_moment(i) if whole else g.double())
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
        for i, (gradient, part) in enumerate(zip(gradients, self.update_of_all(x, sizes), strict=True)):
            if gradient is None:
                continue
            if self.metric:
                part = part * self.whitening(i)
            self.velocity[i] = self.momentum * self.velocity[i] + part
            if not self.l2:
                self.thetas[i] *= 1 - self.lr[i] * self.weight_decay[i]
            self.thetas[i] -= self.lr[i] * self.velocity[i]

    def update_of_all(self, x, sizes):
        """The update of each parameter, by one matrix or, with `layers`, by one for each."""
        if not self.layers:
            return self.update(x).split(sizes)
        rows, parts = self.rows, []
        for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
            self.rows = [row[start : start + size] for row in rows]
            parts.append(self.update(x[start : start + size]))
        self.rows = rows
        return parts

    def whitening(self, i):
        """`D^-1/2` of a parameter: AdamW's second moment, from all gradients so far, with its bias correction."""
        weights = [0.001 * 0.999**age for age in reversed(range(len(self.seen[i])))]
        v = sum(w * g * g for w, g in zip(weights, self.seen[i], strict=True)) / (1 - 0.999 ** len(weights))
        if self.metric == "factored" and len(self.shapes[i]) > 1:
            whole = v.view(self.shapes[i][0], -1)
            v = (torch.outer(whole.mean(dim=1), whole.mean(dim=0)) / whole.mean()).view(-1)
        return torch.where(v > 0, 1 / torch.sqrt(torch.sqrt(v) + 1e-8), 0.0)

    def first_moment(self, i):
        """`D^-1/2 m_hat`."""
        beta, m = self.moment, 0.0
        for g in self.seen[i]:
            m = beta * m + (1 - beta) * g
        return m / (1 - beta ** len(self.seen[i])) * self.whitening(i)

    def parameters(self):
        """The parameters in their shapes."""
        return [theta.view(shape) for theta, shape in zip(self.thetas, self.shapes, strict=True)]


class NaiveMFAC(Naive):
    """`(lambda I + (1/m) sum_i g_i g_i^T)^-1 x`; in a metric times lambda, so that what was not seen stays as it is."""

    def update(self, x):
        count = self.num_grads
        damp = self.matrix.get("damp", 0.0)
        mean = sum(float(g @ g) for g in self.rows) / len(self.rows)
        damp += self.matrix.get("relative_damp", 0.0) * mean / count
        fisher = damp * torch.eye(x.numel(), dtype=torch.float64)
        for g in self.rows:
            fisher += torch.outer(g, g) / count
        if self.metric and damp == 0.0:
            return x  # relative to rows that are all zero
        return torch.linalg.solve(fisher, damp * x if self.metric else x)


class NaiveGGT(Naive):
    """`((sum_i w_i^2 g_i g_i^T)^(1/2) + eps I)^-1 x`, or of the momentum over the rows.

    In a metric `(I + sum_i w_i^2 g_i g_i^T / eps^2)^(-1/2) x`.
    """

    def preconditioned(self):
        beta1 = self.matrix.get("beta1", 0.0)
        if not beta1:
            return super().preconditioned()
        return sum((1 - beta1) * beta1**age * g for age, g in enumerate(reversed(self.rows)))

    def update(self, x):
        mean = sum(float(g @ g) for g in self.rows) / len(self.rows)
        eps = self.matrix.get("eps", 0.0) + self.matrix.get("relative_eps", 0.0) * math.sqrt(mean)
        beta2 = self.matrix.get("beta2", 1.0)
        second = torch.zeros(x.numel(), x.numel(), dtype=torch.float64)
        for age, g in enumerate(reversed(self.rows)):
            second += beta2 ** (2 * age) * torch.outer(g, g)
        spectrum, vectors = torch.linalg.eigh(second)
        if self.metric:
            return x if eps == 0.0 else vectors @ ((vectors.T @ x) / torch.sqrt(1 + spectrum.clamp(min=0) / eps**2))
        # Rounding of zero has a root of 1e-8 of the largest: the vector has nothing there, unless it is dense.
        spectrum = torch.where(spectrum > 1e-13 * spectrum[-1], spectrum, 0.0)
        return vectors @ ((vectors.T @ x) / (spectrum.sqrt() + eps))


class PublishedMFAC:
    """M-FAC's recursion as its paper writes it, over a ring of gradients that starts with zeros (arXiv 2107.03356, 3).

    `F_0^-1 = I / lambda`, `F_i^-1 = F_i-1^-1 - F_i-1^-1 g_i (F_i-1^-1 g_i)^T / (m + g_i^T F_i-1^-1 g_i)`, `i = 1 .. m`.
    """

    def __init__(self, size, num_grads, damp):
        self.ring, self.damp, self.steps = torch.zeros(num_grads, size, dtype=torch.float64), damp, 0

    def update(self, gradient):
        """`F_m^-1 g`, with `g` in the place of the oldest."""
        count, size = self.ring.shape
        self.ring[self.steps % count] = gradient
        self.steps += 1
        inverse = torch.eye(size, dtype=torch.float64) / self.damp
        for g in self.ring:
            image = inverse @ g
            inverse -= torch.outer(image, image) / (count + g @ image)
        return inverse @ gradient


class PublishedGGT:
    """GGT as its paper computes it, by the small matrix's eigenvectors, with the published code's ridge.

    `G^T G + ridge I = V S^2 V^T`, `U = G V S^-1`, `u = U ((S + eps I)^-1 - I / eps) U^T g + g / eps`
    (arXiv 1806.02958, 2.1).
    """

    def __init__(self, size, num_grads, eps, ridge):
        self.ring, self.eps, self.ridge, self.steps = torch.zeros(size, num_grads, dtype=torch.float64), eps, ridge, 0

    def update(self, gradient):
        """`u`, with `g` in the place of the oldest column."""
        count = self.ring.shape[1]
        self.ring[:, self.steps % count] = gradient
        self.steps += 1
        G = self.ring[:, : min(self.steps, count)]  # a column of zeros has no direction without a ridge
        squares, V = torch.linalg.eigh(G.T @ G + self.ridge * torch.eye(G.shape[1], dtype=torch.float64))
        S = squares.sqrt()
        U = G @ V / S
        return U @ ((1 / (S + self.eps) - 1 / self.eps) * (U.T @ gradient)) + gradient / self.eps
