"""Naive twins of the projected optimizers: one matrix, float64, everything written out, nothing in place.

Signs of singular vectors are free, and moments that are kept at a refresh depend on them: a twin takes those of the
optimizer's own basis, which is all that it sees of it. Random numbers are the optimizer's, by their documented seed.
"""

import torch

from hf_efcp.projected.subspace import generator


class Twin:
    """GaLore. A subclass has another subspace, or something between projection and Adam."""

    def __init__(self, theta, *, lr, rank, scale, gap, left, weight_decay=0.0, **more):
        self.theta, self.lr, self.rank, self.scale, self.gap = theta.double().clone(), lr, rank, scale, gap
        self.left, self.weight_decay, self.more = left, weight_decay, more
        self.P, self.step, self.since, self.refreshes, self.ranks = None, 0, 0, 0, []

    def subspace(self, G):
        U, _, _ = torch.linalg.svd(G, full_matrices=False)
        return U[:, : self.rank]

    def due(self, G):
        return self.since >= self.gap

    def turned(self, new):
        pass

    def direction(self, R):
        return R

    def update(self, gradient, basis):
        """One step; `basis` is the optimizer's after the same step."""
        G = gradient.double().reshape(self.theta.shape)
        G = G if self.left else G.T
        if self.P is None or self.due(G):
            new = self.subspace(G)
            new = new * torch.sign((new * basis.double()[:, : new.shape[1]]).sum(dim=0))
            if self.P is None:
                self.m = self.v = torch.zeros(new.shape[1], G.shape[1], dtype=torch.float64)
            else:
                self.turned(new)
            self.P, self.since, self.refreshes, self.at_refresh = new, 0, self.refreshes + 1, (new.T @ G).norm()
            self.kept = new.T @ G
        self.ranks.append(self.P.shape[1])
        self.since += 1
        self.step += 1
        g = self.direction(self.P.T @ G)
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        N = (self.m / (1 - 0.9**self.step)) / ((self.v / (1 - 0.999**self.step)).sqrt() + 1e-8)
        U = self.P @ N
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.lr * self.scale * (U if self.left else U.T)


class Sketched(Twin):
    """LORENZA's subspace; its gradient is a matter of the caller."""

    def sketch(self, G):
        columns = min(self.rank + 8, *G.shape)
        source = generator(self.more["seed"], self.more["position"], self.step)
        omega = torch.randn(G.shape[1], columns, generator=source).double()
        Q0 = torch.linalg.qr(G @ omega).Q
        U, values, _ = torch.linalg.svd(Q0.T @ G, full_matrices=False)
        return Q0 @ U, values

    def subspace(self, G):
        return self.sketch(G)[0][:, : self.rank]


class AdaRank(Sketched):
    """Rank by the residual, moments turned."""

    def subspace(self, G):
        basis, values = self.sketch(G)
        for rank in range(self.more["min_rank"], self.rank + 1):
            if G.norm() ** 2 - (values[:rank] ** 2).sum() <= max(self.more["residual"], 1e-6) * G.norm() ** 2:
                return basis[:, :rank]
        return basis[:, : self.rank]

    def due(self, G):
        return (self.P.T @ G).norm() <= self.more["threshold"] * self.at_refresh or self.since >= self.gap

    def turned(self, new):
        T = new.T @ self.P
        self.m, self.v = T @ self.m, T**2 @ self.v


class Natural(Twin):
    """The matrix over all entries of the projected gradient, `d x d`."""

    rows = ()

    def turned(self, new):
        self.rows = [(new.T @ self.P @ row) for row in self.rows]

    def direction(self, R):
        self.rows = [*self.rows, R][-self.more["history"] :]
        flat = torch.stack([row.reshape(-1) for row in self.rows])
        matrix = self.more["damp"] * torch.eye(R.numel(), dtype=torch.float64) + flat.T @ flat
        return torch.linalg.solve(matrix, R.reshape(-1)).view_as(R)
