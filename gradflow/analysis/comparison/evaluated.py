"""A run and everything that was read off it, for figures, tables and comparisons of many."""

from dataclasses import dataclass

from gradflow.analysis.phases import Phases
from gradflow.analysis.prediction.prediction import Prediction
from gradflow.analysis.rates import Rate
from gradflow.results.trajectory import Trajectory


@dataclass(frozen=True)
class EvaluatedRun:
    """One finished (or interrupted) run and what was read off it.

    Attributes:
        name: what it is called among others.
        label: its text for figures and tables.
        group: runs of one group belong together; empty for those of the same regularizers.
        trajectory: what was recorded.
        phases: the two phases, None where they are not defined.
        rate: decay rate of the imbalance in the regularization phase, None where it cannot be
            measured.
        prediction: what theory predicts for the run, None where it predicts nothing.
        along: what the slow flow predicts over the times of `rate`; only where that is not
            constant.
        notes: remarks for people, such as replicas that diverged.
    """

    name: str
    label: str
    group: str
    trajectory: Trajectory
    phases: Phases | None = None
    rate: Rate | None = None
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()
    along: Rate | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its end."""
        return self.trajectory.interrupted

    @property
    def is_slow(self) -> bool:
        """Whether the run lies on the minima from its start on."""
        return self.trajectory.dynamics.is_slow

    @property
    def is_smooth(self) -> bool:
        """Whether nothing random moves it."""
        return not self.trajectory.dynamics.is_random(self.trajectory.problem)
