"""How the quantities of claims are measured, and the verdicts."""
