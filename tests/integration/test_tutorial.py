"""The tutorial's Python runs as it stands, on less data and for fewer steps."""

import re

from PIL import Image

SMALLER = {
    "images_train=600, images_val=120, image_label_images_per_class=12": (
        "images_train=16, images_val=6, image_label_images_per_class=1"
    ),
    'resolve_config("quickstart", overrides=[f"data.description={description}"])': (
        'resolve_config("tiny", overrides=[f"data.description={description}", "training.iterations=3"])'
    ),
}


def test_the_tutorial_runs(repository, tmp_path, monkeypatch, capsys):
    text = (repository / "docs" / "tutorial" / "first-detector.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    code = "\n".join(blocks)
    for whole, smaller in SMALLER.items():
        assert code.count(whole) == 1
        code = code.replace(whole, smaller)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "first-detector.md", "exec"), {"__name__": "tutorial"})
    assert "3 steps" in capsys.readouterr().out
    with Image.open("found.png") as drawing:
        assert min(drawing.size) >= 480
