"""The Python code of the README and of the pages in docs/ runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/slow_flow.md", "docs/regularizers.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Blocks run one after the other; the second page starts from the imports of the first."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec("import gradflow as gf", names)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
