import json
import subprocess
import sys

import numpy as np
import pytest

PROBE = """
import json, logging, sys
from proxydet.runtime.lvis_api import LVIS
import numpy
print(json.dumps({
    "handlers": len(logging.getLogger().handlers),
    "drawing": [name for name in ("cv2", "matplotlib", "lvis") if name in sys.modules],
    "leak": hasattr(numpy, "float"),
}))
"""


def test_import_loads_no_drawing_and_leaves_logging_and_numpy_alone():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {"handlers": 0, "drawing": [], "leak": False}


@pytest.mark.parametrize(("shift", "ap"), [(0.0, 1.0), (100.0, 0.0)])
def test_evaluates(tmp_path, shift, ap):
    from proxydet.runtime.lvis_api import LVIS, LVISEval, LVISResults

    image = {
        "id": 1,
        "width": 50,
        "height": 50,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    }
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    truth = {
        "images": [image],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [10, 10, 20, 20],
                "area": 400,
                "segmentation": square,
            }
        ],
        "categories": [{"id": 1, "name": "square", "frequency": "f"}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    found = [{"image_id": 1, "category_id": 1, "bbox": [10 + shift, 10, 20, 20], "score": 0.9}]
    ground_truth = LVIS(str(path))
    evaluation = LVISEval(ground_truth, LVISResults(ground_truth, found), iou_type="bbox")
    evaluation.run()
    assert evaluation.get_results()["AP"] == pytest.approx(ap)
    assert not hasattr(np, "float")
