"""The update rule of the discrete training that a dynamics is or describes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradflow.backend.types import Scalar
from gradflow.checks import Decay


@dataclass(frozen=True)
class UpdateRule:
    r"""What a step of training of size $h$ makes of the gradient; as it stands, plain SGD.

    - `momentum`: $\beta$ in $[0, 1)$, None without one.
    - `decay`: "coupled" penalties enter the velocity and the optimizer, "decoupled" ones do not.
    - `nesterov`: whether it looks ahead.
    - `optimizer`: what makes an optax gradient transformation, or is one; None for SGD.
    - `schedule`: the step size $h_k$ as a function of the step number; None for a constant one.
    """

    momentum: Scalar | None = None
    decay: Decay = "coupled"
    nesterov: bool = False
    optimizer: Any = None
    schedule: Callable[[Any], Any] | None = None

    def beyond_plain(self, heavy_ball: bool) -> tuple[str, str] | None:
        """What plain SGD has not, and the argument without it; None if the rule is plain.

        Momentum counts as plain for a formula of `heavy_ball`.
        """
        for present, what, fix in (
            (self.optimizer is not None, "an optimizer", "optimizer=None"),
            (self.schedule is not None, "a schedule of step sizes", "a constant step_size"),
            (self.momentum is not None and not heavy_ball, "momentum", "momentum=0.0"),
            (self.nesterov, "Nesterov momentum", "nesterov=False"),
        ):
            if present:
                return what, fix
        return None

    def check_plain(self, owner: str, observable: str, heavy_ball: bool = False) -> None:
        """Raise a `ValueError` if a formula of plain SGD, or heavy ball, does not hold for it."""
        found = self.beyond_plain(heavy_ball)
        if found is not None:
            what, fix = found
            raise ValueError(
                f"observables: {observable} is a formula of plain SGD"
                f"{' and heavy ball' if heavy_ball else ''} and does not hold with {what}; leave "
                f"it out, or give {owner} {fix}."
            )

    def check_balances_decay(self, observable: str) -> None:
        """Raise a `ValueError` if decay and gradient do not act with the same strength."""
        what = None
        if self.optimizer is not None:
            what = "an optimizer"
        elif self.momentum is not None and self.decay == "decoupled":
            what = "momentum and decoupled decay"
        if what is not None:
            raise ValueError(
                f"observables: {observable} balances the gradient and weight decay with equal "
                f"strength, which does not hold with {what}; leave it out."
            )
