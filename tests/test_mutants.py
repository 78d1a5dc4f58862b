"""`tests/mutants.toml` keeps up with the code: every entry can still be applied."""

import tomllib

import pytest
from run_mutants import ROOT

MUTANTS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text("utf-8"))["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["why"])
def test_the_code_to_break_is_there_once(mutant):
    assert (ROOT / mutant["file"]).read_text("utf-8").count(mutant["find"]) == 1
    file, _, test = mutant["tests"].partition("::")
    named = f"def {test.partition('[')[0]}(" if test else ""
    assert named in (ROOT / file).read_text("utf-8")
    assert mutant["find"] != mutant["replace"]
