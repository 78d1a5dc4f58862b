"""Statistics of ensembles gathered chunk by chunk, in memory that does not grow with the paths."""

from gradflow.accumulators.moments import Moments as Moments
from gradflow.accumulators.sketch import Sketch as Sketch
