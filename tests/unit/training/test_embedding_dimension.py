"""A run's classifier has as many dimensions as the text embeddings of its data."""

import pytest

from proxydet.errors import ConfigError
from proxydet.recipes import get_recipe, resolve_config
from proxydet.training.train import fit_to_embeddings


def test_fresh_weights_take_the_dimensions_of_the_data_and_say_so(caplog):
    tiny = get_recipe("tiny")
    fitted = fit_to_embeddings(tiny, 512)
    assert fitted.model.classifier.embedding_dim == 512
    assert fitted.model.pyramid == tiny.model.pyramid
    assert "model.classifier.embedding_dim is 512" in caplog.text


def test_nothing_changes_where_they_fit(caplog):
    small = get_recipe("small")
    assert fit_to_embeddings(small, 512) is small
    assert caplog.text == ""


def test_starting_weights_fix_the_dimensions(tmp_path):
    config = resolve_config("r50", None, [f"training.weights={tmp_path / 'boxsup.pth'}"])
    with pytest.raises(ConfigError, match=r"have 768 dimensions; .*embedding_dim is 512") as caught:
        fit_to_embeddings(config, 768)
    assert "boxsup.pth" in (caught.value.hint or "")
    assert "--set model.classifier.embedding_dim=768" in (caught.value.hint or "")
