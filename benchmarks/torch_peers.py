"""The same training in PyTorch: torchsde, and a training loop with autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchsde
from cases import Training

torch.set_default_dtype(torch.float64)


class LabelNoiseEquation(torch.nn.Module):
    """The equation of SGD with noise on the labels, all layers in one vector a path."""

    sde_type = "ito"

    def __init__(self, training: Training):
        super().__init__()
        self.target = torch.as_tensor(training.target)
        self.shape = training.target.shape
        self.scale = float(np.sqrt(training.step_size)) * training.std
        self.depth = len(training.layers)
        self.noise_type = "scalar" if self.target.numel() == 1 else "general"

    def layers(self, y: torch.Tensor) -> list[torch.Tensor]:
        """The layers with the path axis first."""
        return [w.reshape(-1, *self.shape) for w in y.chunk(self.depth, dim=1)]

    def pulled_back(self, layers: list[torch.Tensor], m: torch.Tensor) -> torch.Tensor:
        """The gradients for an end-to-end gradient `m`."""
        rights = [None]
        for w in layers[:-1]:
            rights.append(w if rights[-1] is None else w @ rights[-1])
        gradients = []
        for i in reversed(range(len(layers))):
            gradients.append(m if rights[i] is None else m @ rights[i].mT)
            m = layers[i].mT @ m
        return -torch.cat([g.flatten(1) for g in reversed(gradients)], dim=1)

    def residual(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """P - T."""
        product = layers[0]
        for w in layers[1:]:
            product = w @ product
        return product - self.target

    def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The drift."""
        layers = self.layers(y)
        return self.pulled_back(layers, self.residual(layers))

    def g_prod(self, t: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Diffusion times increments: the columns are never formed."""
        return self.pulled_back(self.layers(y), self.scale * v.reshape(-1, *self.shape))


def torchsde_euler(training: Training, paths: int) -> Callable[[int], Any]:
    """`torchsde.sdeint` with Euler and a Brownian interval that knows the step."""
    equation = LabelNoiseEquation(training)
    flat = np.concatenate([w.ravel() for w in training.layers])
    starts = torch.as_tensor(flat).expand(paths, -1).contiguous()
    dt = training.step_size / training.substeps

    def run(steps: int) -> Any:
        stop = steps * dt
        motion = torchsde.BrownianInterval(
            0.0, stop, size=(paths, training.target.size), dtype=torch.float64, dt=dt, entropy=3
        )
        with torch.no_grad():
            ends = torchsde.sdeint(
                equation, starts, torch.tensor([0.0, stop]), bm=motion, method="euler", dt=dt
            )[-1]
        return equation.layers(ends)

    return run


def minibatch_loop(
    x: np.ndarray, y: np.ndarray, layers: tuple[np.ndarray, ...], step_size: float, batch: int,
    paths: int,
) -> Callable[[int], Any]:  # fmt: skip
    """SGD of many networks at once: rows with replacement, `torch.bmm`, autograd."""
    rows, labels = torch.as_tensor(x), torch.as_tensor(y)

    def run(steps: int) -> Any:
        generator = torch.Generator().manual_seed(4)
        weights = [
            torch.as_tensor(w).expand(paths, -1, -1).clone().requires_grad_() for w in layers
        ]
        for _ in range(steps):
            chosen = torch.randint(len(rows), (paths, batch), generator=generator)
            hidden, wanted = rows[chosen], labels[chosen]
            for w in weights:
                hidden = torch.bmm(hidden, w.mT)
            loss = 0.5 / batch * torch.sum((hidden - wanted) ** 2)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, g in zip(weights, gradients, strict=True):
                    w.sub_(g, alpha=step_size)
        return [w.detach() for w in weights]

    return run
