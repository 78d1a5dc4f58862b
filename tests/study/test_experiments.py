"""The shipped experiments are found, valid and built."""

import pytest

from gradflow.cli.experiments import find, shipped, titles
from gradflow.study.run.build import prepare
from gradflow.study.spec.load import load_study


def test_the_experiments_are_there():
    found = set(shipped())
    assert {"two_phases", "conservation", "diabetes"} <= found
    assert {"discretization", "sgd_vs_sde", "noise_gallery", "exact", "momentum"} <= found
    assert {"slow_flow", "rectangular", "flattest", "real_data_slow"} <= found
    assert all(titles().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("short", [False, True])
def test_they_can_be_built(name, short):
    study = load_study(find(name), short=short)
    assert study.spec.name == name
    prepared = prepare(study)
    assert len(prepared.runs) == len(study.spec.run)
    assert len(prepared.orders) == len(study.spec.orders)
    assert study.spec.claim and study.spec.figure


def test_finding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("two_phases") == shipped()["two_phases"]
    (tmp_path / "two_phases").write_text("")
    assert str(find("two_phases")) == "two_phases"  # a file of the user comes first
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "spec.toml").write_text("")
    assert find("result").name == "spec.toml"
    with pytest.raises(ValueError, match=r'did you mean "diabetes"\? shipped: conservation'):
        find("diabetis")
