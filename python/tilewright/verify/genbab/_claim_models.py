# SPDX-License-Identifier: Apache-2.0
"""Small graphs that the claim and the tests bound: nets of each family, attention, an LSTM step, a power network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

FAMILIES: dict[str, Activation] = {
    "relu": torch.relu,
    "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "abs": torch.abs,
    "clip": lambda x: x.clamp(-0.5, 0.7),
    "elu": nn.functional.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "arctan": torch.atan,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": lambda x: torch.exp(0.5 * x),
    "square": lambda x: 0.3 * x**2,
    "cube": lambda x: 0.2 * x**3,
    "sqrt": lambda x: torch.sqrt(nn.functional.softplus(x)),
    "log": lambda x: torch.log(1 + nn.functional.softplus(x)),
    "reciprocal": lambda x: 1 / (1 + torch.sigmoid(x)),
    "root": lambda x: (torch.sigmoid(x) + 0.1) ** 1.5,
}


class Net(nn.Module):
    """Linear layers with one activation between them."""

    def __init__(self, sizes: tuple[int, ...], activation: Activation, seed: int, gain: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = activation
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(
                    gain * torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
                )
                layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Gated(nn.Module):
    """Two branches multiplied: (tanh U x) * (V x), read by a linear."""

    def __init__(self, seed: int, n_in: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.u, self.v, self.out = nn.Linear(n_in, width), nn.Linear(n_in, width), nn.Linear(width, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.u(x)) * self.v(x))


class SoftmaxNet(nn.Module):
    """A softmax over a small hidden layer, read by a linear."""

    def __init__(self, seed: int, n_in: int = 4, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.out = nn.Linear(n_in, width), nn.Linear(width, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.first(x), -1))


class Attention(nn.Module):
    """One head of attention with a residual, over ``tokens`` tokens given as one flat vector."""

    def __init__(self, seed: int, tokens: int = 3, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.width = tokens, width
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.tokens, self.width)
        scores = self.q(x) @ self.k(x).transpose(-2, -1) / math.sqrt(self.width)
        return (x + self.out(torch.softmax(scores, -1) @ self.v(x))).flatten(1)


class LSTMStep(nn.Module):
    """One step of an LSTM from a given state; the input holds x, h and c in one vector."""

    def __init__(self, seed: int, n_in: int = 3, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.n_in, self.width = n_in, width
        self.cell = nn.LSTMCell(n_in, width)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        step, h, c = x.split([self.n_in, self.width, self.width], -1)
        h, c = self.cell(step, (h, c))
        return torch.cat([h, c], -1)


class PowerFlow(nn.Module):
    """Loads of two buses -> what a small network's voltages leave unbalanced, in three buses with AC lines.

    Input: p1, q1, p2, q2 (per unit). Bus 0 holds voltage 1 and angle 0. A line carries

        p_ij = g v_i^2 - v_i v_j (g cos t_ij + b sin t_ij),   q_ij = -b v_i^2 - v_i v_j (g sin t_ij - b cos t_ij)

    and the output is, for buses 1 and 2, the sum of p_ij (q_ij) over lines plus the load: 0 in a solved network.
    """

    LINES = ((0, 1, 1.9, -5.2), (0, 2, 1.3, -4.1), (1, 2, 1.6, -4.7))
    LOADS = (0.6, 0.25, 0.45, 0.15)

    def __init__(self, seed: int, width: int = 12) -> None:
        super().__init__()
        self.net = Net((4, width, width, 4), torch.relu, seed)
        self.register_buffer("mean", torch.tensor(self.LOADS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor)
        state = self.net((x - self.mean) / (0.05 * self.mean)) * 0.05
        v1, v2, t1, t2 = (state + torch.tensor([0.95, 0.95, -0.1, -0.1], dtype=torch.float64)).split(1, -1)
        one, zero = torch.ones_like(v1), torch.zeros_like(v1)
        v, t = (one, v1, v2), (zero, t1, t2)
        balance = [x[..., 0:1], x[..., 1:2], x[..., 2:3], x[..., 3:4]]
        for i, j, g, b in self.LINES:
            for here, there in ((i, j), (j, i)):
                if here:
                    p, q = _flow(v[here], v[there], t[here] - t[there], g, b)
                    balance[2 * here - 2] = balance[2 * here - 2] + p
                    balance[2 * here - 1] = balance[2 * here - 1] + q
        return torch.cat(balance, -1)

    def fit(self, seed: int, steps: int = 1500) -> float:
        """Train on random loads of the box, unsupervised; the last batch's root mean square imbalance."""
        generator = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam(self.net.parameters(), lr=5e-3)
        decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.01 ** (1 / steps))
        loss = torch.zeros(())
        for _ in range(steps):
            low, high = self.box()
            x = low + torch.rand((64, 4), generator=generator, dtype=torch.float64) * (high - low)
            loss = self(x).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            decay.step()
        return float(loss.detach().sqrt())

    def box(self) -> tuple[Tensor, Tensor]:
        """Loads within 5 % of their mean."""
        assert isinstance(self.mean, Tensor)
        return self.mean * 0.95, self.mean * 1.05


def _flow(v: Tensor, w: Tensor, t: Tensor, g: float, b: float) -> tuple[Tensor, Tensor]:
    product, sine, cosine = v * w, torch.sin(t), torch.cos(t)
    square = v * v
    return (
        g * square - product * (g * cosine + b * sine),
        -b * square - product * (g * sine - b * cosine),
    )


def graphs(seed: int) -> dict[str, tuple[nn.Module, int]]:
    """Every kind of graph with its number of inputs: a three-layer net of each family, and the composite ones."""
    found: dict[str, tuple[nn.Module, int]] = {name: (Net((4, 8, 8, 3), f, seed), 4) for name, f in FAMILIES.items()}
    found["product"] = (Gated(seed), 4)
    found["softmax"] = (SoftmaxNet(seed), 4)
    found["attention"] = (Attention(seed), 12)
    found["lstm"] = (LSTMStep(seed), 11)
    return found


def relu_milp(net: Net, x_L: Tensor, x_U: Tensor, c: Tensor, bounds: list[tuple[Tensor, Tensor]]) -> float:
    """min c . net(x) over the box, exactly: mixed-integer linear programming (HiGHS), big-M from ``bounds`` of each
    hidden layer before its ReLU, gap 0."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net.layers]  # type: ignore[operator]
    hidden = layers[:-1]
    n_in = len(x_L)
    count = n_in + sum(2 * len(b) for _, b in hidden)
    low, high, whole = np.full(count, -np.inf), np.full(count, np.inf), np.zeros(count)
    low[:n_in], high[:n_in] = x_L.numpy(), x_U.numpy()
    rows: list[tuple[dict[int, float], float, float]] = []
    before, at = list(range(n_in)), n_in
    for (w, b), (l, u) in zip(hidden, bounds, strict=True):
        out = list(range(at, at + len(b)))
        gate = list(range(at + len(b), at + 2 * len(b)))
        at += 2 * len(b)
        for j in range(len(b)):
            lj, uj = min(float(l[j]), 0.0), max(float(u[j]), 0.0)
            low[out[j]], high[out[j]] = 0.0, uj
            low[gate[j]], high[gate[j]], whole[gate[j]] = 0.0, 1.0, 1
            z = {before[i]: float(w[j, i]) for i in range(len(before))}
            rows.append(({out[j]: 1.0, **{i: -v for i, v in z.items()}}, float(b[j]), np.inf))
            rows.append(({out[j]: 1.0, **{i: -v for i, v in z.items()}, gate[j]: -lj}, -np.inf, float(b[j]) - lj))
            rows.append(({out[j]: 1.0, gate[j]: -uj}, -np.inf, 0.0))
        before = out
    matrix = lil_matrix((len(rows), count))
    for r, (entries, _, _) in enumerate(rows):
        for i, value in entries.items():
            matrix[r, i] = value
    w, b = layers[-1]
    objective = np.zeros(count)
    objective[before] = c.numpy() @ w
    constraint = LinearConstraint(matrix.tocsr(), [r[1] for r in rows], [r[2] for r in rows])
    found = milp(
        objective, constraints=constraint, integrality=whole, bounds=Bounds(low, high), options={"mip_rel_gap": 0}
    )
    if found.status != 0:
        raise RuntimeError(f"the mixed-integer program was not solved: {found.message}")
    return float(found.fun + c.numpy() @ b)
