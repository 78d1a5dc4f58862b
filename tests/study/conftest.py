"""Loading specs that are given as text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gradflow.study.spec.load import Study, load_study


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Study]:
    """Load a spec given as text."""

    def load(text: str, **options: object) -> Study:
        path = tmp_path / "spec.toml"
        path.write_text(text, encoding="utf-8")
        return load_study(path, **options)

    return load


@pytest.fixture
def errors(load: Callable[..., Study], tmp_path: Path) -> Callable[[str], list[str]]:
    """The error lines of a spec given as text, without the folder of the file."""

    def errors(text: str) -> list[str]:
        with pytest.raises(ValueError) as caught:
            load(text)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return errors
