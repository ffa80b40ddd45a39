"""The CPU door: lets the CUDA-only parts of Megatron-core and NeMo run on CPU with gloo.

This is the only module that patches upstream code. `open_cpu_door` does nothing where CUDA is available.
Elsewhere it answers, with CPU tensors, the calls that megatron-core 0.15.3 and nemo_toolkit 2.7.3 make
without asking which device there is: factories with `device="cuda"`, `.to("cuda")`, `.cuda()`, pinned
memory, tensor type names, random number state, streams and events. The patches are on those named
functions alone, so an ordinary operation on tensors costs nothing extra. `write_checkpoints_in_process` is
the one patch for every device.

Call it before `megatron` is imported: some of its modules bind `torch.cuda` functions when they load.
"""

from __future__ import annotations

import functools
import queue
import sys
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange")


def cuda_is_available() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if cuda_is_available() else CPU


def open_cpu_door() -> None:
    """Patch `torch` (see the module's text) where there is no CUDA; a second call does nothing."""
    if cuda_is_available() or getattr(torch.cuda, "_minitron_cpu_door", False):
        return
    assert "megatron.core" not in sys.modules, "open_cpu_door must be called before megatron is imported"
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))
    _patch_tensor()
    _patch_cuda_module()
    _refuse_cuda_builds()
    torch.cuda._minitron_cpu_door = True  # type: ignore[attr-defined]


def write_checkpoints_in_process() -> None:
    """Let Megatron's checkpoint writer write in the thread that calls it, one file after another, on every device.

    Its own way forks a process a file, out of a process that has threads of gloo, NCCL, CUDA and OpenMP and may hang
    for it, and starts a `multiprocessing.Manager`, which costs 5 to 8 s because it imports the main module again.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync

    def write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            answers: queue.Queue[Any] = queue.Queue()
            pending: queue.Queue[int] = queue.Queue()
            pending.put(index)
            writer.write_preloaded_data(transforms, index, bucket, answers, pending, True)
            answer = answers.get()[1]
            if isinstance(answer, Exception):
                results.put(answer)
                return
            written[index] = answer
        results.put(written)

    filesystem_async._results_queue = queue.Queue()
    writer.write_preloaded_data_multiproc = staticmethod(write)


def _refuse_cuda_builds() -> None:
    """Keep Megatron from compiling CUDA code when it is imported: it takes a failure for "not available".

    Besides the time, a process killed while compiling would leave a lock behind that hangs every later import.
    """
    from torch.utils import cpp_extension

    def load_inline(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("CUDA extensions are not built where there is no CUDA")

    cpp_extension.load_inline = load_inline


def _names_cuda(target: Any) -> bool:
    if isinstance(target, torch.device):
        return target.type == "cuda"
    return isinstance(target, str) and target.startswith("cuda")


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _patch_tensor() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]


class _Stream:
    """Stands for a CUDA stream or event: work on CPU is done when the call returns, so waiting is nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        return self

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = _nothing


class _Generators:
    """Stands for `torch.cuda.default_generators`: the CPU generator under every index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _returning(value: Any) -> Callable[..., Any]:
    """A new function that answers `value`: torch's compiler wants every name to have a function of its own."""
    return lambda *args, **kwargs: value


def _patch_cuda_module() -> None:
    import torch.cuda.random as cuda_random

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    answers: dict[str, Any] = {
        "current_device": _returning(CPU),
        "device_count": _returning(1),
        "default_generators": _Generators(),
        "_lazy_call": lambda call, **kwargs: call(),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: stream if stream is not None else _Stream(),
        "memory_stats": lambda *args, **kwargs: {},
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
    }
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
        answers[name] = _returning(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = _returning(0)
    for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long"):
        answers[f"{kind}Tensor"] = getattr(torch, f"{kind}Tensor")
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for module in (torch.cuda, cuda_random):
        for function in (get_rng_state, set_rng_state, manual_seed):
            setattr(module, function.__name__, function)
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _returning(None))
