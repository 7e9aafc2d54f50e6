"""Misspelt paths: the error names what is called nearly so."""

from __future__ import annotations

import pytest

from proxydet.data.dataset import DatasetConfig
from proxydet.errors import DataError, InputError
from proxydet.paths import require_run


def test_the_hint_names_what_is_called_nearly_so(tmp_path):
    for place in ("runs/pets", "runs/photos"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "pets.toml").touch()
    with pytest.raises(InputError) as caught:
        require_run(tmp_path / "runs" / "pest")
    assert f"did you mean {tmp_path / 'runs' / 'pets'}? " in str(caught.value.hint)
    with pytest.raises(DataError) as caught:
        DatasetConfig.from_toml(tmp_path / "pets")
    assert f"did you mean {tmp_path / 'pets.toml'}? " in str(caught.value.hint)
    for nowhere in (tmp_path / "other", tmp_path / "none" / "pets"):
        with pytest.raises(InputError) as caught:
            require_run(nowhere)
        assert "did you mean" not in str(caught.value.hint)
