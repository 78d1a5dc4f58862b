"""What cannot be measured, and what to do about it, said in Python or in a spec."""


class Unmeasured(ValueError):
    """A quantity that a run does not give.

    Its text is for Python. `in_spec` is the same for a study, whose user writes TOML keys.

    **Arguments:**

    - `fact`: why there is no number.
    - `python`, `spec`: what to do, in the words of each.
    """

    def __init__(self, fact: str, python: str, spec: str):
        super().__init__(f"{fact}; {python}")
        self.fact = fact
        self.in_spec = f"{fact}; {spec}"


def in_spec(error: ValueError) -> str:
    """The text of an error in the words of a spec, where it has such."""
    return getattr(error, "in_spec", str(error))
