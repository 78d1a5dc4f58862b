"""The code in docs/testing.md runs, and finds the errors that it plants."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings

FAST_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The names that the code blocks of the page define, run one after the other."""
    names = {"__name__": "page"}
    settings.register_profile("page", settings.get_profile("fixed"), phases=FAST_PHASES)
    settings.load_profile("page")
    try:
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(block, "docs/testing.md", "exec"), names)
    finally:
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
    return names


@pytest.fixture(scope="module")
def failure(page):
    """What the test of the planted error says."""
    with pytest.raises(AssertionError) as caught:
        page["test_wrong_gradient_turns_with_the_hidden_units"]()
    return str(caught.value)


def without_numbers(text):
    """The text with every number as #; which case is the smallest is up to hypothesis."""
    masked = re.sub(r"(?<![W_g\w])-?\d+\.?\d*(e-?\d+)?", "#", text)
    return re.sub(r"g_\d", "g_#", re.sub(r"\s+", " ", masked)).replace("[ ", "[").replace(" ,", ",")


@pytest.mark.slow
def test_the_right_gradient_passes(page):
    page["test_gradient_turns_with_the_hidden_units"]()


@pytest.mark.slow
def test_the_planted_error_is_found_and_the_network_shown(failure):
    assert "my_wrong_gradient does not follow hidden_rotations: g_2[" in failure
    shown = re.search(r"^network of widths \(2, 2, 2\):\n(.*?)\nchanged", failure, re.M | re.S)
    entries = re.findall(r"-?\d+\.?\d*", shown.group(1).replace("W_1", "").replace("W_2", ""))
    assert len(entries) == 8
    assert set(np.abs(np.array(entries, dtype=float))) <= {0.0, 0.5, 1.0}


def test_the_message_on_the_page_is_the_message(failure):
    shown = re.search(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL).group(1)
    assert without_numbers(shown).strip() == without_numbers(failure).strip()


def test_the_flow_with_one_layer_twice_as_fast_is_found(page):
    text = page["flow_message"]
    assert "G_1 = W_2^T W_2 - W_1 W_1^T, entry [" in text and "is not conserved by my_flow" in text
    assert "W_1 = [[ 0.5, -1. ]" in text


@pytest.mark.slow
def test_the_test_of_step_sizes_passes(page):
    page["test_descent_stays_near_the_flow"]()


def test_the_order_and_the_match_of_the_page(page):
    assert abs(page["slopes"][-1] - 1.0) < 0.1
    assert set(page["match"].detectable) == {"squared_norms[0]", "squared_norms[1]"}


def test_every_strategy_and_transformation_is_on_the_page():
    import gradflow.testing as gt

    for name in (*gt.TRANSFORMATIONS, *vars(gt.strategies)):
        if not name.startswith("_") and callable(getattr(gt.strategies, name, name.split)):
            assert f"`{name}" in PAGE or f" {name}" in PAGE, name


def test_without_hypothesis_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import gradflow\n"
        "try:\n    import gradflow.testing\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'gradflow[test]'" in done.stdout, done.stderr


def test_importing_gradflow_does_not_import_hypothesis():
    program = "import sys, gradflow; gradflow.DeepLinear; print('hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
