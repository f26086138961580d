"""Replays compiled layers: torch's compiler works on fake tensors, and what it generates runs without its kernels.

So fusion, what is kept for the backward pass and what is computed again are the compiler's own choice, as in a trial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._C._dynamo import guards
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.environment import missing_for_compiler
from harness.errors import InputError
from harness.predict.replay import Replay, bytes_of
from harness.training import compilation
from harness.training.live_tensors import CompiledLiveTensors


class CompiledFakes(FakeTensorMode):
    """The mode that makes fake tensors, under which layers are compiled: torch leaves them as they are under others."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As of `CompiledLiveTensors`."""
        return True


class CompiledReplay(Replay, CompiledLiveTensors):
    """`Replay` of steps with compiled layers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            return Replay.__torch_dispatch__(self, func, types, args, kwargs)
        # Recomputed layers run operations that draw random numbers with a generator's state; the first run returns it.
        if func not in (torch.ops.higher_order.run_and_save_rng_state, torch.ops.higher_order.run_with_rng_state):
            raise NotImplementedError(f"torch_compile: {func} cannot be replayed on fake tensors")
        at, inner = next((at, each) for at, each in enumerate(args) if isinstance(each, torch._ops.OpOverload))
        out = Replay.__torch_dispatch__(self, inner, types, args[at + 1 :], kwargs)
        if at > 0:
            return out
        state = torch.empty_like(torch.get_rng_state())
        self._add(state, self.component)
        return state, out

    def allocated(self, allocate: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """A fake buffer of generated code."""
        shape, stride, dtype = arguments
        return torch.empty_strided(shape, stride, dtype=dtype)

    def run_kernel(self, *arguments: Any) -> None:
        """Count a fused kernel, which reads or writes each of its tensors once."""
        self._count((None, 0, bytes_of(arguments)), ())


@contextlib.contextmanager
def compiled_without_kernels() -> Iterator[None]:
    """Within, layers are compiled over fake tensors by a compiler that builds no kernels, with a cache of its own.

    Patches private functions of torch (2.13) that generated code calls with addresses of tensors, which fake ones have
    not. An option of torch to run compiled code on fake tensors would replace it (pytorch/pytorch#136446).

    Raises:
        InputError: torch finds no compiler for what it generates, by which it learns what the processor can do.
    """
    if missing := missing_for_compiler("cpu"):
        raise InputError(missing)
    from torch._inductor import config  # the compiler takes seconds to import
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import fresh_cache

    functions = mock.patch.multiple(guards, _reinterpret_tensor=_view, assert_alignment=_unchecked)
    kernels = mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=_kernel)
    with compilation.compiler(), config.patch(compile_threads=1), fresh_cache(), functions, kernels:
        yield


def _kernel(*arguments: Any) -> None:
    for tracker in CompiledLiveTensors.entered[-1:]:
        if isinstance(tracker, CompiledReplay):
            tracker.run_kernel(*arguments)


def _view(tensor: torch.Tensor, shape: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, shape, stride, tensor.storage_offset() + offset)


def _unchecked(*of_tensor: Any) -> None:
    """Fake tensors have no address to be aligned."""
