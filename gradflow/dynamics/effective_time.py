r"""The clock on which runs with different momenta keep pace.

Momentum $\beta$ sums the gradients of many steps, $\sum_j \beta^j = 1/(1 - \beta)$, so a step moves
the weights as one of size $h/(1 - \beta)$ does: Nesterov's as heavy ball's, in descent and in the
flows that describe it (`HeavyBallFlow`, `SlowFlow`), whose time is $t = h k$ as well. Their common
clock is the effective time

$$\tau = \frac{h k}{1 - \beta} = \frac{t}{1 - \beta}.$$

Decoupled decay does not pass through the velocity and is slower on this clock, by $1 - \beta$.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import optax

from gradflow.dynamics.base import AbstractDynamics


def momentum_of(dynamics: AbstractDynamics) -> float:
    r"""The momentum $\beta$ of a dynamics or of the training that it describes; 0 without one.

    Of the optimizers of optax only `sgd` has one that is known; the others keep time in $h k$.
    """
    rule = dynamics.update_rule
    return float(_of_optimizer(rule.optimizer) if rule.momentum is None else rule.momentum)


def effective_time(dynamics: AbstractDynamics, time: Any) -> np.ndarray:
    r"""The effective times $t / (1 - \beta)$ of flow times."""
    return np.asarray(time, dtype=float) / (1.0 - momentum_of(dynamics))


def differ_in_momentum(dynamics: Iterable[AbstractDynamics]) -> bool:
    """Whether dynamics keep pace in effective time and not in flow time."""
    return len({momentum_of(one) for one in dynamics}) > 1


def _of_optimizer(optimizer: Any) -> Any:
    """The momentum of optax's `sgd`, given by name or as a partial function."""
    if getattr(optimizer, "name", None) == optax.sgd.__name__:
        return dict(optimizer.options).get("momentum") or 0.0
    if getattr(optimizer, "func", None) is optax.sgd:
        return optimizer.keywords.get("momentum") or 0.0
    return 0.0
