"""A pretend GPU: tensors on "cuda:0" that hold their numbers in CPU memory, and a log of launches and host waits.

The package runs on it unchanged. What torch refuses on a GPU is refused here: operations on tensors of two devices, a
CPU generator, `numpy()`. What makes the host wait for a GPU is logged by the line of the package that asked for it:
reading a number, indices by a list or a mask, blocking copies. A non-blocking copy to the CPU holds nonsense until the
host has waited. Collectives of CUDA tensors go through gloo, and are refused where the process group has no backend
for them. Not pretended: kernels, streams that run at the same time, memory.
"""

import collections
import contextlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BEHIND = 100
"""Launches after an event that keep a GPU busy while the host waits for the event."""
PACKAGE = f"{Path('ssl') / 'manyviews'}/"
MEMORY = 80 << 30
NO_LAUNCH = {
    *("view", "_unsafe_view", "_reshape_alias", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze"),
    *(
        "squeeze",
        "split",
        "split_with_sizes",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "diagonal",
        "unfold",
        "narrow",
    ),
    *("chunk", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "real"),
    *("resize_", "movedim", "record_stream", "is_pinned", "sym_size", "sym_stride"),
}
"""Operations without a kernel: views, and memory without content."""
WAITS = {
    *("_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"),
    *("unique_consecutive", "_linalg_eigh", "linalg_inv_ex", "_linalg_svd", "_linalg_check_errors", "bincount"),
}
"""Operations whose result, or whose shape, the host waits for."""
TWO_DEVICES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_foreach_copy_", "set_"}
"""Operations that may be called with tensors of two devices."""


class Log:
    """Launches and host waits, by the line of the package that caused them; collectives by name.

    A look is a wait for an event with much work launched after it, which the GPU does meanwhile.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.launched = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.looks: collections.Counter[str] = collections.Counter()
        self.collectives: collections.Counter[str] = collections.Counter()
        self.pending: list[Callable[[], object]] = []

    def launch(self) -> None:
        """Notes a launch."""
        self.launched += 1
        self.launches[_line()] += 1

    def wait(self, reason: str, since: int | None = None) -> None:
        """Notes that the host waits, unless it is a thread beside the main one; pending copies have arrived then.

        `since`: launches before what is waited for, if not all is.
        """
        if threading.current_thread() is threading.main_thread():
            busy = since is not None and self.launched - since >= BEHIND
            (self.looks if busy else self.waits)[f"{_line()} {reason}"] += 1
        with self.lock:
            for arrive in self.pending:
                arrive()
            self.pending.clear()

    def __str__(self) -> str:
        waits = [f"  {count:6} waits {line}" for line, count in self.waits.most_common()]
        launches = [f"  {count:6} launches {line}" for line, count in self.launches.most_common(25)]
        return "\n".join([f"{self.waits.total()} waits, {self.launches.total()} launches", *waits, *launches])


class PretendTensor(torch.Tensor):
    """A tensor on the pretend GPU; `numbers` are its content, on the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "PretendTensor":
        # Its real device is "meta": autograd starts no thread for it, and asks no driver.
        form: Any = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device="meta"
        )
        form.numbers = numbers
        return form

    device = property(lambda self: _gpu())
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **options: Any) -> str:
        return f"PretendTensor({self.numbers!r})"

    def __getitem__(self, index: Any) -> Any:
        return torch.Tensor.__getitem__(self, _as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _as_tensors(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Any = PretendTensor(self.numbers.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        LOG.wait("tolist")
        return self.numbers.detach().tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), options: Any = None) -> Any:
        return _run(func, args, options or {})


LOG = Log()
"""The log of the pretend GPU of this process."""


@contextlib.contextmanager
def pretend_cuda(devices: int = 1) -> Iterator[Log]:
    """Makes torch see GPUs, while the context is open; yields the log."""
    LOG.clear()
    memory = types.SimpleNamespace(name="Pretend", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": devices,
        "current_device": _gpu().index,
        "set_device": None,
        "get_device_capability": (9, 0),
        "get_device_name": "Pretend",
        "get_device_properties": memory,
        "is_bf16_supported": True,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "is_current_stream_capturing": False,
        "manual_seed": None,
        "manual_seed_all": None,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
        patch.setattr(torch.accelerator, "is_available", lambda *args: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *args, **options: torch.device("cuda"))
        patch.setattr(torch.accelerator, "device_count", lambda: devices)
        patch.setattr(torch.accelerator, "current_device_index", lambda: _gpu().index)
        patch.setattr(torch.accelerator, "current_stream", lambda *args: _Stream())
        patch.setattr(torch.accelerator, "synchronize", lambda *args: LOG.wait("synchronize"))
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda *args: LOG.wait("synchronize"))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *args: tensor)
        # Wrapped tensors have no version in inference mode; its code runs without gradient instead.
        patch.setattr(torch.inference_mode, "__enter__", _without_gradient)
        patch.setattr(torch.inference_mode, "__exit__", lambda mode, *problem: mode.instead.__exit__(*problem))
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch.amp, "autocast", _Autocast)
        patch.setattr(torch.amp.autocast_mode, "autocast", _Autocast)
        patch.setattr(dist, "init_process_group", _init_process_group(dist.init_process_group))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with _Functions(), _Dispatch():
                yield LOG
        finally:
            # Accelerate remembers the device.
            AcceleratorState._reset_state(reset_partial_state=True)


class _Stream:
    device = property(lambda self: _gpu())

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        LOG.wait("stream.synchronize")


class _Event:
    def __init__(self, *args: Any, **options: Any) -> None:
        self.recorded = 0

    def record(self, stream: Any = None) -> None:
        self.recorded = LOG.launched

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        LOG.wait("event.synchronize", self.recorded)

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _without_gradient(mode: Any) -> None:
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


class _Generator(torch.Generator):
    """A generator of the pretend GPU, which is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = super().__new__(cls)
        generator.on_gpu = torch.device(device).type == "cuda"
        return generator


class _Autocast(torch.autocast):
    """Autocast of the pretend GPU is that of the CPU."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type in ("cuda", "meta") else device_type, *args, **options)


class _Functions(TorchFunctionMode):
    """Tensors from numbers of the host: torch makes them on the CPU and copies them, which waits."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), options: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(options or {}))
        # A device without index: torch would ask the driver for the current one.
        args, options = tree_map(_indexed, tuple(args)), tree_map(_indexed, dict(options or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = options.get("device")
            data = args[0] if args else options.get("data")
            if not isinstance(data, torch.Tensor) and device is not None and torch.device(device).type == "cuda":
                del options["device"]
                return _to_gpu(func(*args, **options))
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendTensor):
            options.pop("device", None)
            return _to_gpu(args[0].numbers.new_tensor(*args[1:], **options))
        return func(*args, **options)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), options: Any = None) -> Any:
        if func.overloadpacket.__name__ == "to":
            # In inference mode it arrives as a whole.
            with self:
                return func.decompose(*args, **(options or {}))
        return _run(func, args, options or {})


def _run(func: Any, args: Any, options: dict[str, Any]) -> Any:
    """One operation: on the numbers, after the rules of a GPU."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, torch.Tensor)]
    pretend = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    if name == "to":
        # In inference mode torch leaves it whole.
        return _to(*args, **options)
    device = options.get("device")
    to_gpu = device is not None and torch.device(device).type in ("cuda", "meta")
    if func.namespace == "c10d":
        return _collective(func, name, args, options, bool(pretend), bool(others))
    if not pretend and not to_gpu:
        return func(*args, **options)
    if name in ("_to_copy", "copy_"):
        return _copy(func, name, args, options)
    if pretend and name not in TWO_DEVICES and any(tensor.dim() > 0 for tensor in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got some on cuda:0 and some on cpu"
        )
    _check_generator(options)
    _note(name, args, options)
    if device is not None:
        options = {**options, "device": "cpu"}
    result = KERNELS.get(name, func)(*tree_map(_numbers, args), **tree_map(_numbers, options))
    if name in ("_local_scalar_dense", "is_nonzero", "equal", "is_same_size", "is_pinned"):
        return result
    if not any(returned.alias_info is not None and returned.alias_info.is_write for returned in func._schema.returns):
        return tree_map(_wrapped, result)
    # What was written to is returned as the object it was.
    written = {id(tensor.numbers): tensor for tensor in pretend}
    return tree_map(lambda leaf: written.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _to(source: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """`Tensor.to` by a copy, or without one where neither device nor type changes."""
    if args and isinstance(args[0], torch.Tensor):
        options |= {"device": args[0].device, "dtype": args[0].dtype}
        args = args[1:]
    names = ["device", "dtype"] if args and isinstance(args[0], torch.device) else ["dtype"]
    options |= dict(zip([*names, "non_blocking", "copy"], args, strict=False))
    copy, device, dtype = options.pop("copy", False), options.get("device"), options.get("dtype")
    same_device = device is None or (torch.device(device).type == "cpu") != isinstance(source, PretendTensor)
    if same_device and dtype in (None, source.dtype) and not copy:
        return source
    return _copy(torch.ops.aten._to_copy.default, "_to_copy", (source,), options)


def _copy(func: Any, name: str, args: Any, options: dict[str, Any]) -> Any:
    target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
    from_gpu = isinstance(source, PretendTensor)
    device = options.get("device")
    to_gpu = (
        isinstance(target, PretendTensor)
        if target is not None
        else from_gpu
        if device is None
        else (torch.device(device).type != "cpu")
    )
    waits = not (options.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    LOG.launch()
    if from_gpu != to_gpu and waits:
        LOG.wait(f"blocking copy to {'GPU' if to_gpu else 'CPU'} of {tuple(source.shape)}")
    if target is None:
        result = func(_numbers(source), **(options if device is None else {**options, "device": "cpu"}))
        if result.data_ptr() == _numbers(source).data_ptr():
            result = result.clone()
        into, value = result, result.clone() if from_gpu and not to_gpu and not waits else None
    else:
        result, into, value = target, _numbers(target), None
        if from_gpu and not to_gpu and not waits:
            value = _numbers(source).to(into.dtype).clone()
        else:
            into.copy_(_numbers(source))
    if value is not None:
        into.fill_(-(1 << 6))
        LOG.pending.append(lambda: into.copy_(value))
    return PretendTensor(result) if to_gpu and target is None else result


def _note(name: str, args: Any, options: dict[str, Any]) -> None:
    """Logs the launch of an operation, and the wait for its result."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(args[0], PretendTensor) and isinstance(index, PretendTensor):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            if index.dtype in (torch.bool, torch.uint8):
                LOG.wait(f"{name} by a mask")
            elif not isinstance(index, PretendTensor):
                LOG.wait(f"{name} by indices on the CPU")
    waits_for_length = name == "repeat_interleave" and options.get("output_size") is None
    if name in WAITS or waits_for_length:
        LOG.wait(name)
    if name not in NO_LAUNCH:
        LOG.launch()


def _check_generator(options: dict[str, Any]) -> None:
    generator = options.get("generator")
    if generator is not None and not getattr(generator, "on_gpu", False):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _collective(func: Any, name: str, args: Any, options: dict[str, Any], on_gpu: bool, on_cpu: bool) -> Any:
    """A collective through gloo, if the group has a backend for the device of its tensors."""
    for device, used in (("cuda", on_gpu), ("cpu", on_cpu)):
        if used and BACKENDS and device not in BACKENDS:
            raise RuntimeError(f"No backend type associated with device type {device}")
    LOG.collectives[f"{'nccl' if on_gpu else 'gloo'} {name}"] += 1
    if on_gpu:
        LOG.launch()
    return func(*tree_map(_numbers, args), **tree_map(_numbers, options))


BACKENDS: set[str] = set()
"""Devices for which the process group has a backend."""


def _init_process_group(real: Callable[..., Any]) -> Callable[..., Any]:
    def init(backend: str | None = None, *args: Any, **options: Any) -> Any:
        BACKENDS.clear()
        known = {"gloo": "cpu", "nccl": "cuda"}
        parts = (backend or "cpu:gloo,cuda:nccl").split(",")
        BACKENDS.update(part.split(":")[0] if ":" in part else known[part] for part in parts)
        options.pop("device_id", None)
        return real("gloo", *args, **options)

    return init


def _gpu() -> torch.device:
    """The only GPU that this process uses."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _per_channel(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(1, -1, *[1] * (like.dim() - 2)).to(like.dtype)


def _batch_norm_stats(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(x.float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return mean, (variance + eps).rsqrt()


def _batch_norm_gather(
    x: torch.Tensor, means: Any, inverse: Any, running_mean: Any, running_var: Any, momentum: float, eps: float, n: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    share = (n / n.sum()).unsqueeze(1)
    mean = (share * means).sum(0)
    variance = (share * (inverse**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * n.sum() / (n.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def _batch_norm_elemt(x: torch.Tensor, weight: Any, bias: Any, mean: Any, inverse: Any, eps: float) -> torch.Tensor:
    weight, bias, mean, inverse = (_per_channel(value, x) for value in (weight, bias, mean, inverse))
    return (x - mean) * inverse * weight + bias


def _batch_norm_backward_reduce(
    gradient: torch.Tensor, x: torch.Tensor, mean: Any, inverse: Any, weight: Any, *needed: bool
) -> tuple[torch.Tensor, ...]:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    total, product = gradient.sum(axes), (gradient * (x - _per_channel(mean, x))).sum(axes)
    return total, product, product * inverse, total.clone()


def _batch_norm_backward_elemt(
    gradient: torch.Tensor, x: torch.Tensor, mean: Any, inverse: Any, weight: Any, total: Any, product: Any, n: Any
) -> torch.Tensor:
    mean, inverse, weight = (_per_channel(value, x) for value in (mean, inverse, weight))
    total, product = (_per_channel(value / n.sum(), x) for value in (total, product))
    return (gradient - total - (x - mean) * inverse**2 * product) * inverse * weight


KERNELS: dict[str, Any] = {
    "batch_norm_stats": _batch_norm_stats,
    "batch_norm_gather_stats_with_counts": _batch_norm_gather,
    "batch_norm_elemt": _batch_norm_elemt,
    "batch_norm_backward_reduce": _batch_norm_backward_reduce,
    "batch_norm_backward_elemt": _batch_norm_backward_elemt,
}
"""Operations that torch has on GPUs only: those of SyncBatchNorm."""


def _indexed(leaf: Any) -> Any:
    return _gpu() if isinstance(leaf, str | torch.device) and str(leaf) == "cuda" else leaf


def _numbers(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, PretendTensor) else leaf


def _wrapped(leaf: Any) -> Any:
    return PretendTensor(leaf) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor) else leaf


def _to_gpu(made: torch.Tensor) -> PretendTensor:
    LOG.launch()
    LOG.wait(f"copy to GPU of numbers of the host {tuple(made.shape)}")
    return PretendTensor(made)


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.tensor(list(index), dtype=torch.int64) if isinstance(index, list | range) else index


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path:
            return f"{path.split(PACKAGE)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"
