"""Studies: declarative specs, the runner, claims and their verdicts.

The quantities of claims and the kinds of figures are registered here, so whatever reads a spec
knows them.
"""

from gradflow.study import claims as claims, figures as figures
