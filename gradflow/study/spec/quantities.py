"""The quantities a claim can be about: what each needs and what it means.

The functions that measure them are in `measures.py`; this table is what a spec is checked against
and what `gradflow study --help` prints.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """What a claim about one quantity has to give.

    Attributes:
        meaning: one line, for people.
        runs: the smallest and the largest number of runs (None: any).
        observable: "required", "optional" (it has a default) or "unused".
        predicted: whether `expected = "predicted"` is possible.
        keys: further keys of the claim that the quantity reads; those in `required` must be given.
        required: keys that must be given.
        reads: observables that the runs must record where the claim names none.
        words: the words `expected` takes in place of a number.
        orders: whether it is about an [[orders]] table rather than runs.
    """

    meaning: str
    runs: tuple[int, int | None] = (1, 1)
    observable: str = "unused"
    predicted: bool = False
    keys: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    reads: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    orders: bool = False


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


QUANTITIES: dict[str, Quantity] = {
    "rate": Quantity(
        "exponential decay rate of an observable (default: imbalance) in the regularization phase",
        observable="optional",
        predicted=True,
        keys=_keys("window", "of_mean", "theory"),
        reads=("imbalance",),
    ),
    "drift": Quantity(
        "linear slope of an observable (default: imbalance) in the regularization phase",
        observable="optional",
        predicted=True,
        keys=_keys("window", "theory"),
        reads=("imbalance",),
    ),
    "optimization_end": Quantity(
        "flow time at which the optimization phase ends", predicted=True, keys=_keys("theory")
    ),
    "optimization_rate": Quantity(
        "exponential rate of the optimization phase", predicted=True, keys=_keys("theory")
    ),
    "separation": Quantity(
        "optimization rate over regularization rate", predicted=True, keys=_keys("theory")
    ),
    "final": Quantity(
        "mean of an observable over replicas, at the end",
        observable="required",
        keys=_keys("component"),
    ),
    "change": Quantity(
        "mean over replicas of the final minus the initial value",
        observable="required",
        keys=_keys("component"),
    ),
    "change_ratio": Quantity(
        "mean over replicas of the final over the initial value",
        observable="required",
        keys=_keys("component"),
    ),
    "component_ratio": Quantity(
        "mean over replicas of the entry `component` over that of the entry `over`, at the end",
        observable="required",
        keys=_keys("component", "over"),
        required=_keys("component", "over"),
    ),
    "max_change": Quantity(
        "largest |x(t) - x(0)| over times, entries and replicas",
        observable="required",
        keys=_keys("component"),
    ),
    "balancedness_change": Quantity(
        "largest |G_i(t) - G_i(0)| over entries, layers, times and replicas (stored weights)"
    ),
    "balancedness_decay": Quantity(
        "largest |G_i(t) - exp(-2 rate t) G_i(0)| under weight decay (stored weights)"
    ),
    "gd_identity": Quantity(
        "largest residual of the one-step identity of gradient descent for G_i "
        "(stored weights, every step saved)"
    ),
    "diagonal_change": Quantity(
        "largest change of a diagonal entry of G_i over layers, times and replicas (stored weights)"
    ),
    "noether_decay": Quantity(
        "largest residual of J_i(k + 1) = momentum * J_i(k), relative (stored weights, every step "
        "saved)"
    ),
    "path_difference": Quantity(
        "largest difference of the weights of two runs over entries, times and replicas (stored "
        "weights, the same saved times)",
        runs=(2, 2),
    ),
    "drift_ratio": Quantity(
        "measured change of the imbalance over the time integral of its exact expected drift",
        keys=_keys("window"),
        reads=("imbalance", "imbalance_drift"),
    ),
    "predicted_ratio": Quantity(
        "measured over predicted value of the quantity named by `of`",
        observable="optional",
        keys=_keys("of", "window", "of_mean", "theory"),
        required=_keys("of"),
    ),
    "difference": Quantity(
        "mean of an observable at the end in the first run minus that in the second",
        runs=(2, 2),
        observable="required",
        keys=_keys("component", "relative"),
    ),
    "displacement_ratio": Quantity(
        "mean change of an observable in the first run over that in the second (default window: "
        "the regularization phase of the first)",
        runs=(2, 2),
        observable="required",
        keys=_keys("component", "window"),
    ),
    "speed_up": Quantity(
        "wall time of the first run over that of the second, both without compilation",
        runs=(2, 2),
    ),
    "agreement": Quantity(
        "whether two runs agree on an observable within `tolerance` (default 0.05) at all times",
        runs=(2, 2),
        observable="required",
        keys=_keys("times"),
        words=("agree", "differ"),
    ),
    "exponent": Quantity(
        "slope of the log of |quantity named by `of`| against the log of `parameter` over runs",
        runs=(2, None),
        observable="optional",
        keys=_keys("of", "parameter", "component", "window", "of_mean"),
        required=_keys("of", "parameter"),
    ),
    "order": Quantity(
        "measured order of the distance between two dynamics, of an observable of an [[orders]] "
        "table",
        runs=(0, 0),
        observable="optional",
        orders=True,
    ),
    "order_status": Quantity(
        "whether an [[orders]] table resolves the order of an observable",
        runs=(0, 0),
        observable="optional",
        words=("resolved", "not resolved", "not asymptotic", "below resolution"),
        orders=True,
    ),
}
