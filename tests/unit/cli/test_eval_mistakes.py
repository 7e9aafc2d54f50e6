"""Mistakes in the options of ``proxydet eval`` are told before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxydet_cli.main import main


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--run", "RUN", "--split", "test"], "--split is 'test'", "[val] in a data description"),
        (["--run", "RUN"], "is no run folder", "proxydet train or quickstart wrote"),
        (["--run", "RUN/absent"], "there is no run folder", "proxydet quickstart"),
    ],
)
def test_what_is_no_run_or_split_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(["eval", *words]))
    assert stopped.value.code == 3
    told = capsys.readouterr().err
    assert message in told
    assert hint in told
