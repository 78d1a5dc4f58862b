"""The orders in the step size at which two dynamics agree."""
