"""Detectors as files that run without detectron2: ONNX, and programs of torch.export."""
