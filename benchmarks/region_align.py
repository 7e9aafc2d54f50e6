"""Time of the CPU's sparse RoIAlign against torchvision's kernel, in the same run.

    python benchmarks/region_align.py [--threads 2]

Prints milliseconds (median of 7) of the forward pass and of forward and backward, and the ratio torchvision / own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import roi_align

from proxydet.runtime.roi_align import RegionGrid, align_regions

CASES = {
    "quickstart: 8 images 160x160, 512 regions, 64 channels": (8, 64, 20, 512, 60.0),
    "R50: 2 images 416x416, 1024 regions, 256 channels": (2, 256, 52, 1024, 80.0),
}
STRIDE = 8
GRID = RegionGrid(side=7, scales=[1 / STRIDE], sampling_ratio=0)


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call, median of 7 after one warm-up."""
    call()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def with_backward(pool: Callable[[Tensor], Tensor], features: Tensor) -> None:
    """Pool, and send a gradient of ones back."""
    features.grad = None
    pooled = pool(features)
    pooled.backward(torch.ones_like(pooled))


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    for name, (batch, channels, cells, count, size) in CASES.items():
        torch.manual_seed(0)
        features = torch.randn(batch, channels, cells, cells, requires_grad=True)
        corner = torch.rand(count, 2) * (cells * STRIDE - size)
        far = corner + size * (0.5 + torch.rand(count, 2))
        rois = torch.cat([torch.randint(batch, (count, 1)).float(), corner, far], dim=1)

        def kernel(x: Tensor, rois: Tensor = rois) -> Tensor:
            return roi_align(x, rois, (7, 7), 1 / STRIDE, 0, aligned=True)

        def own(x: Tensor, rois: Tensor = rois) -> Tensor:
            return align_regions([x], rois, torch.zeros(len(rois), dtype=torch.int64), GRID)

        print(name)
        show("forward", partial(kernel, features.detach()), partial(own, features.detach()))
        show(
            "with backward",
            partial(with_backward, kernel, features),
            partial(with_backward, own, features),
        )


def show(part: str, kernel: Callable[[], object], own: Callable[[], object]) -> None:
    """Measure both, one after the other, and print a line."""
    times = [median_ms(kernel), median_ms(own)]
    ratio = times[0] / times[1]
    print(f"  {part:14} torchvision {times[0]:8.1f}  own {times[1]:8.1f}  ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
