"""Label-noise SGD in PyTorch on an accelerator: a loop, and the loop recorded as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Training

RECORDED = 64
"""Steps in one graph."""


def descent(training: Training, paths: int, dtype: str, graph: bool) -> Callable[[int], Any]:
    """SGD of many networks of square layers, path axis first, gradients by hand.

    Without a graph every operation is started by Python. With one, the steps of `RECORDED` are
    started as a whole.
    """
    device, real = torch.device("cuda"), getattr(torch, dtype)
    drift, noise = training.descent_scales
    target = torch.as_tensor(training.target, dtype=real, device=device)
    scalar = target.numel() == 1
    shape = (paths,) if scalar else (paths, *target.shape)
    starts = [
        torch.as_tensor(w.squeeze(), dtype=real, device=device).expand(shape).contiguous()
        for w in training.layers
    ]
    layers = [w.clone() for w in starts]

    def step() -> None:
        rights = [layers[0]]
        for w in layers[1:]:
            rights.append(w * rights[-1] if scalar else torch.bmm(w, rights[-1]))
        normals = torch.randn(shape, dtype=real, device=device)
        m = drift * (rights.pop() - target.squeeze()) + noise * normals
        changes = []
        for i in reversed(range(len(layers))):
            below = rights[i - 1] if i else None
            if scalar:
                changes.append(m if below is None else m * below)
                m = layers[i] * m
            else:
                changes.append(m if below is None else torch.bmm(m, below.mT))
                m = torch.bmm(layers[i].mT, m) if i else m
        for w, change in zip(reversed(layers), changes, strict=True):
            w.sub_(change)

    recorded = torch.cuda.CUDAGraph() if graph else None
    if recorded is not None:
        step()  # what a library sets up at its first call cannot be recorded
        torch.cuda.synchronize()
        with torch.cuda.graph(recorded):
            for _ in range(RECORDED):
                step()

    def run(steps: int) -> Any:
        with torch.no_grad():
            for w, start in zip(layers, starts, strict=True):
                w.copy_(start)
            if recorded is None:
                for _ in range(steps):
                    step()
            else:
                for _ in range(-(-steps // RECORDED)):
                    recorded.replay()
            torch.cuda.synchronize()
        return [w.cpu().numpy() for w in layers]

    return run
