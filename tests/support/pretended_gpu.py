"""A pretended CUDA device in CPU memory: finds device mixes, waits of the host and kernel launches where there is no GPU.

A `GpuTensor` reports that it is on ``cuda:0``; its values are an ordinary CPU tensor's, so results can be compared with the
CPU's. Code that asks for ``.device`` takes the way that it takes on a GPU. Every operation on such tensors is

- refused, as CUDA would, if it mixes them with CPU tensors of one or more dimensions;
- counted as a launch, unless it only makes a view;
- counted as a wait where the host would wait for the device: results whose size depends on values, values read into Python,
  copies to the host, and copies to the device that are not ``non_blocking``.

::

    with PretendedGpu() as gpu:
        found = gpu.moved(network).detect(images)
    print(gpu.launches.total(), gpu.waits.total())

It does not see: autocast on CUDA, NCCL, cuDNN, memory, device-side assertions, operations of several kernels (one launch).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_PROJECT = str(Path(__file__).resolve().parents[2] / "proxydet")

# The size of their result depends on values, or they return one.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Nothing is computed: memory is shared, or left as it is.
_NO_KERNEL = {
    "aten::alias",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}
_READS = {"tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__"}
_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class DeviceMixError(RuntimeError):
    """An operation takes tensors of the device and of the CPU."""


def _place() -> str:
    """Return file, line and function of the project's innermost frame; of the backward pass, "backward"."""
    frame = sys._getframe(1)
    place = ""
    while frame is not None:
        code = frame.f_code
        if not place and code.co_filename.startswith(_PROJECT):
            place = f"{code.co_filename[len(_PROJECT) + 1 :]}:{frame.f_lineno} {code.co_name}"
        if code.co_name == "_engine_run_backward" and "backward" not in place:
            return "backward"
        frame = frame.f_back  # type: ignore[assignment]
    return place or "elsewhere"


# torch's own functions for nested values look for many more kinds of them, and take half of a test's time.
def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the same with a function applied to what is in tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    return change(value)


class GpuTensor(Tensor):
    """A tensor that reports to be on the device; ``values`` is the CPU tensor that it stands for."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        tensor: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=values.device,
        )
        tensor.values = values.detach()
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.values})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return PretendedGpu.active.call(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return PretendedGpu.active.run(func, args, dict(kwargs or {}))


class PretendedGpu:
    """A context in which ``cuda:0`` is pretended; it counts what is done there.

    Attributes:
        launches: Kernels and copies by (operation, place).
        waits: Waits of the host by (reason, place).
        calling: Whether a function of a tensor on the device is running.
    """

    active: PretendedGpu

    def __init__(self) -> None:
        self.launches: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.calling = False
        self._stack = ExitStack()

    def __enter__(self) -> PretendedGpu:
        PretendedGpu.active = self
        enter = self._stack.enter_context
        enter(mock.patch.object(torch, "Generator", _generator))
        # A tensor subclass does not go through inference mode's views; without gradients the same is computed.
        for name in ("__enter__", "__exit__"):
            enter(mock.patch.object(torch.inference_mode, name, getattr(_NoGradient, name)))
        # A GPU's gradients are clipped in lists, which torch does for tensors of its own type only.
        enter(
            mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", return_value=True)
        )
        enter(_Factories(self))
        enter(_HostCalls(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @staticmethod
    def moved(module: nn.Module) -> nn.Module:
        """Move a module's parameters and buffers to the device in place, uncounted; what is shared stays shared."""
        made: dict[int, Tensor] = {}
        with torch._C.DisableTorchFunction():
            for part in module.modules():
                for name, tensor in part._parameters.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            values = GpuTensor(tensor.detach().clone())
                            made[id(tensor)] = nn.Parameter(values, tensor.requires_grad)
                        part._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
                for name, tensor in part._buffers.items():
                    if tensor is not None:
                        made.setdefault(id(tensor), GpuTensor(tensor.detach().clone()))
                        part._buffers[name] = made[id(tensor)]
        return module

    @contextmanager
    def counted(self) -> Iterator[PretendedGpu]:
        """Count from 0 what is done inside."""
        self.launches.clear()
        self.waits.clear()
        yield self

    # -- counting ------------------------------------------------------------------------------------------------------

    def launch(self, operation: str) -> None:
        """Count a kernel or a copy."""
        self.launches[operation.removeprefix("aten::"), _place()] += 1

    def wait(self, reason: str) -> None:
        """Count a wait of the host for the device."""
        self.waits[reason.removeprefix("aten::"), _place()] += 1

    def upload(self, *, blocking: bool) -> None:
        """Count a copy from the host."""
        self.launch("copy to the device")
        if blocking:
            self.wait("blocking copy to the device")

    def download(self, reason: str) -> None:
        """Count a copy to the host, which waits."""
        self.launch("copy to the host")
        self.wait(reason)

    # -- calls from Python ---------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function of torch of whose arguments at least one is on the device."""
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, GpuTensor):
            if func == _DEVICE:
                return CUDA
            if func == _IS_CUDA:
                return True
            if name in ("numpy", "__array__"):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"
                )
            if name in _READS:
                self.download(name)
                return _to_host(first) if name == "cpu" else getattr(first.values, name)()
            if name == "new_tensor":
                return self._new_tensor(first, *args[1:], **kwargs)
        if name == "to":
            return self.moved_tensor(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            del kwargs["device"]  # zeros_like(x, device=...)
        before, self.calling = self.calling, True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finally:
            self.calling = before

    def moved_tensor(self, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do as `torch.Tensor.to`: (device, dtype, non_blocking, ...), (dtype, non_blocking, ...), (other, ...)."""
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", source.dtype)
        flags = [value for value in args if isinstance(value, bool)]
        for value in args:
            if isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif value is not None and not isinstance(value, bool):
                device = value
        non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
        on_gpu = isinstance(source, GpuTensor)
        to_gpu = on_gpu if device is None else torch.device(device).type == "cuda"
        if on_gpu != to_gpu:
            if to_gpu:
                self.upload(blocking=not non_blocking)
                source = _Upload.apply(source) if source.requires_grad else _uploaded(source)
            else:
                self.download("copy to the host")
                source = _to_host(source)
        with torch._C.DisableTorchFunctionSubclass():
            return source.to(dtype, non_blocking, *flags[1:], **kwargs)

    def _new_tensor(self, like: GpuTensor, data: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("device", None)
        for value in _leaves(data):
            if isinstance(value, GpuTensor):
                self.download("item")
        data = _mapped(lambda v: v.values.tolist() if isinstance(v, GpuTensor) else v, data)
        self.upload(blocking=True)  # torch copies it so
        return GpuTensor(like.values.new_tensor(data, **kwargs))

    # -- operations ----------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation of tensors of which at least one is on the device."""
        name = func._schema.name
        if name == "aten::_to_copy":
            self.launch(name)
            return GpuTensor(func(_values(args[0]), **kwargs))
        if name == "aten::copy_":
            return self._copy(func, *args, **kwargs)
        if name == "aten::_pin_memory":
            return args[0]
        self._check_devices(name, args, kwargs)
        result = func(*_mapped(_values, args), **_mapped(_values, kwargs))
        if name in _WAITING:
            self.wait(name)
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            fills = "put" in name and len(indices) == 1 and args[2].numel() == 1  # masked_fill
            if not fills and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait(f"{name} by a mask")
            if not all(isinstance(index, GpuTensor) for index in indices):
                self.upload(blocking=True)
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        makes_view, aliases = _aliasing(func)
        if not makes_view and name not in _NO_KERNEL:
            self.launch(name)
        if name == "aten::_local_scalar_dense":
            return result
        result = _mapped(_on_device, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if aliases else result

    def _copy(
        self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False
    ) -> Tensor:
        func(_values(target), _values(source))
        if not isinstance(target, GpuTensor):
            self.download("copy to the host")
        # A kernel takes a scalar as an argument.
        elif isinstance(source, GpuTensor) or source.dim() == 0:
            self.launch("copy_")
        else:
            self.upload(blocking=not non_blocking)
        return target

    def _check_devices(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in _INDEXING:  # indices may be on the CPU; what is indexed by the device's may not
            args = [args[0], *args[2:]]
            if not isinstance(args[0], GpuTensor):
                _refuse(name, "a CPU tensor is indexed by one on the device")
        tensors = [value for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
        hosts = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
        joins = name in ("aten::cat", "aten::stack")
        if any(joins or host.dim() > 0 for host in hosts):
            _refuse(name, f"CPU tensors of shapes {[tuple(host.shape) for host in hosts]}")
        if hosts and name.endswith("_") and not isinstance(args[0], GpuTensor):
            _refuse(name, "a CPU tensor is changed in place")


@cache
def _aliasing(func: Any) -> tuple[bool, bool]:
    """Return whether an operation makes a view, and whether its result shares memory with an argument at all."""
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info]
    return any(not alias.is_write for alias in aliases), bool(aliases)


def _refuse(name: str, what: str) -> NoReturn:
    raise DeviceMixError(f"{name} mixes devices at {_place()}: {what}")


def _values(value: Any) -> Any:
    return value.values if isinstance(value, GpuTensor) else value


def _on_device(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, GpuTensor)
    return GpuTensor(value) if plain else value


class _NoGradient:
    """Stands for inference mode."""

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_grad_enabled(self.before)


class _CudaGenerator(torch.Generator):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


_HOST_GENERATOR = torch.Generator


def _generator(device: torch.device | str = _CPU) -> torch.Generator:
    return _CudaGenerator() if torch.device(device).type == "cuda" else _HOST_GENERATOR()


class _Factories(TorchDispatchMode):
    """Puts tensors on the device that torch's C++ code makes for others there (``arange`` within an operation, ...)."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        plain = isinstance(result, Tensor) and not isinstance(result, GpuTensor)
        if not (plain and self._gpu.calling):
            return result
        if any(isinstance(value, Tensor) for value in _leaves((args, kwargs))):
            return result
        if func._schema.name not in _NO_KERNEL:
            self._gpu.launch(func._schema.name)
        return GpuTensor(result)


class _HostCalls(TorchFunctionMode):
    """Makes tensors on the device where Python asks for them, and copies them there."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(value, GpuTensor) for value in _leaves((args, kwargs))):
            return self._gpu.call(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(args[0] if args else None, Tensor):
            if func == _DEVICE:
                return _CPU
            if name == "pin_memory":
                return args[0]
            if name == "cuda":
                name, args = "to", (args[0], CUDA, *args[1:])
            if name == "to":
                return self._gpu.moved_tensor(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            made = func(*args, **{**kwargs, "device": _CPU})
        if name in ("tensor", "as_tensor", "asarray"):
            self._gpu.upload(blocking=True)
        elif name not in ("empty", "empty_strided"):
            self._gpu.launch(name)
        return GpuTensor(made).requires_grad_(made.requires_grad)


def _to_host(source: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        moved: Tensor = _Download.apply(source) if source.requires_grad else _values(source).clone()
    return moved


def _uploaded(source: Tensor) -> GpuTensor:
    with torch._C.DisableTorchFunction():
        return GpuTensor(source.detach().clone())


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor) -> Tensor:
        return _uploaded(source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _values(gradient)


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor) -> Tensor:
        return _values(source).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return GpuTensor(gradient)
