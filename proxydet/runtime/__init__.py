"""What a run stands on: detectron2, RoIAlign and its modes, the environment report, determinism, two runs compared."""
