"""Compiles the repeated layers of a model, and measures what that takes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.environment import DeviceType, missing_for_compiler
from harness.errors import InputError
from harness.spec.trial import TrialSpec

_MOST_GRAPHS = 64
"""Graphs of one layer's code. Torch's own limit (8) is reached where widths, masks and formats vary; beyond it layers
would run uncompiled, and nothing would say so."""


@dataclass
class Compilations:
    """What the compiler has done so far."""

    seconds: float = 0.0
    graphs: set[str] = field(default_factory=set)
    """Torch's names of compilations: `0/1` is the second graph of the first piece of code."""

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """`compile_seconds` and `recompilations`."""
        again = sum(not name.endswith("/0") for name in self.graphs)
        return {"compile_seconds": self.seconds, "recompilations": again}


@contextlib.contextmanager
def counted(spec: TrialSpec, device_type: DeviceType, *, empty_cache: bool) -> Iterator[Compilations]:
    """Within, layers may be compiled, and what that takes is counted. Nothing is where the spec does not ask for it.

    Uses private modules of torch (2.13): `torch._dynamo.callback` for the seconds, and those of `_empty_cache`.
    Counters of compilations and an argument for the cache would replace them; none yet.

    Args:
        spec: of the trial.
        device_type: that it runs on.
        empty_cache: compile everything anew, and leave it in torch's cache. Otherwise what earlier processes compiled
            is taken from there.

    Raises:
        InputError: something that the compiler needs is missing on this machine.
    """
    done = Compilations()
    if not spec.torch_compile:
        yield done
        return
    if missing := missing_for_compiler(device_type):
        raise InputError(missing)
    from torch._dynamo import callback  # the compiler takes seconds to import

    started: list[float] = []

    def start(compilation: callback.CallbackArgs) -> None:
        started.append(time.perf_counter())
        done.graphs.add(str(compilation.compile_id))

    def end(_: callback.CallbackArgs) -> None:
        done.seconds += time.perf_counter() - started.pop()

    with compiler(), _empty_cache() if empty_cache else contextlib.nullcontext():
        callback.on_compile_start(start)
        callback.on_compile_end(end)
        try:
            yield done
        finally:
            callback.callback_handler.remove_start_callback(start)
            callback.callback_handler.remove_end_callback(end)


@contextlib.contextmanager
def compiler() -> Iterator[None]:
    """Within, torch's compiler is set up as trials need it, and knows of nothing that it compiled before."""
    import torch._dynamo.config
    from torch._inductor.async_compile import shutdown_compile_workers

    depth = sys.getrecursionlimit()  # torch's compiler raises it for good
    torch.compiler.reset()
    settings = {
        "recompile_limit": _MOST_GRAPHS,
        "fail_on_recompile_limit_hit": True,
        # It would cut graphs where DistributedDataParallel sends gradients, which is between layers already, and then
        # the tracker of memory sees what is no memory of the step.
        "optimize_ddp": False,
    }
    with torch._dynamo.config.patch(settings):
        try:
            yield
        finally:
            sys.setrecursionlimit(depth)
            shutdown_compile_workers()  # processes of this one, whose end by os._exit they would outlive for a while


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Within, the compiler's cache is empty at first. What it holds in the end joins torch's, for timing visits.

    Uses `fresh_cache` and `cache_dir` of torch's compiler (2.13), which are private.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache

    lasting = cache_dir()
    with fresh_cache():
        yield
        with contextlib.suppress(OSError):  # without it a visit compiles anew
            shutil.copytree(cache_dir(), lasting, copy_function=_copy_aside, dirs_exist_ok=True)


def _copy_aside(source: str, target: str) -> None:
    """Others may be reading the cache: a file is there as a whole or not at all, and one that is there stays."""
    if not os.path.exists(target):
        shutil.copy2(source, f"{target}.{os.getpid()}")
        os.replace(f"{target}.{os.getpid()}", target)


def compile_layers(model: torch.nn.Module) -> None:
    """Compile the repeated layers of a model in place, at their first call: one graph serves all that are alike.

    Raises:
        InputError: the model's layers do not say which they are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError("torch_compile: the model's code does not say which its layers are; use torch_compile: false")
    for layer in layers:
        layer.compile()


def uncompiled(spec: TrialSpec) -> AbstractContextManager[Any]:
    """Within, layers run as they are written: evaluation would need graphs of its own, for a few batches each."""
    return torch.compiler.set_stance("force_eager") if spec.torch_compile else contextlib.nullcontext()
