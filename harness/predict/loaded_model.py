"""A model with fake weights, as a prediction loads it. Predictions of one model after another load it once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from harness.environment import DeviceType
from harness.predict import fake_weights, loading
from harness.predict.allocator import Event
from harness.predict.cards import Capability
from harness.predict.compiled_layers import CompiledFakes, CompiledReplay
from harness.predict.prediction import model_key
from harness.predict.repeated_layers import RepeatedLayers
from harness.predict.replay import Replay
from harness.predict.trace import Entry, requests
from harness.sources import models
from harness.spec.trial import TrialSpec
from harness.training import compilation, distributed, model

_CPU = torch.device("cpu")


class LoadedModel:
    """A model, the mode that makes its tensors, and the tracker that follows them.

    Args:
        network: on `meta`; it gets fake weights.
        spec: of the trial.
        device_type: device to train on.
        capability: compute capability of a CUDA device.
        all_layers: whether steps replay all layers.
        reading: how its weights are loaded on a CPU; null: they are not.
    """

    def __init__(
        self,
        network: Any,
        spec: TrialSpec,
        device_type: DeviceType,
        capability: Capability,
        *,
        all_layers: bool,
        reading: fake_weights.Reading | None = None,
    ) -> None:
        self.network = network
        fakes, replay = (CompiledFakes, CompiledReplay) if spec.torch_compile else (FakeTensorMode, Replay)
        self.fake = fakes(allow_non_fake_inputs=True)
        self.tracker = tracker = replay(device_type, self.fake, capability)
        tracker.component = "weights"
        # Made outside the fake mode: it reads the ranks from a tensor.
        mesh = distributed.device_mesh(_CPU) if spec.sharding != "none" else None
        with self.fake, tracker:
            fake_weights.fill(network, reading)
            if mesh is not None:
                distributed.shard(network, spec.sharding, mesh)
        gc.collect()
        adapters = model.adapters(network)
        tracker.adopt((*network.parameters(), *network.buffers()), "weights")
        tracker.adopt(adapters, "adapters")
        tracker.component = "activations"
        self.trace: list[Entry] = tracker.take_trace()
        """Of making the weights, and on a CPU of what is held for that."""
        self.requests: list[Event] = requests(self.trace)
        """What loading them asks an allocator of CUDA for."""
        if spec.num_processes == 1:  # shards are made of a model in the machine's memory
            upcast = spec.upcasts
            self.requests = loading.events(network, adapters, tracker.key_of, tracker.size_of, upcast=upcast)
        if spec.torch_compile:
            compilation.compile_layers(network)
        self.layers = None if all_layers else RepeatedLayers(network, tracker)
        self._keys = tracker.live_keys()

    def restore(self) -> bool:
        """Let go of what steps have left behind. Returns whether that is all: some models keep tables that have grown
        with the length of a text.
        """
        for parameter in self.network.parameters():
            parameter.grad = None
        gc.collect()
        self.tracker.start_anew()
        return self.tracker.live_keys() == self._keys


_last: dict[Hashable, LoadedModel] = {}
"""The model of the last prediction, if the next one finds it as it was loaded."""


@contextlib.contextmanager
def loaded(
    spec: TrialSpec,
    device_type: DeviceType,
    capability: Capability,
    *,
    all_layers: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[LoadedModel]:
    """Within, the model of a spec is there to be trained.

    Args:
        spec: of the trial.
        device_type: device to train on.
        capability: compute capability of a CUDA device.
        all_layers: whether steps replay all layers.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: the model's config is not available, or no such model can be trained as the spec says.
    """
    key = model_key(spec), spec.folder, device_type, capability, all_layers, trust_remote_code, spec.torch_compile
    taken = _last.pop(key, None)
    if taken is None:
        _last.clear()
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
        reading = _reading(spec, trust_remote_code) if device_type == "cpu" else None
        taken = LoadedModel(network, spec, device_type, capability, all_layers=all_layers, reading=reading)
    yield taken
    if spec.num_processes == 1 and taken.restore():  # not after an error
        _last[key] = taken


def _reading(spec: TrialSpec, trust_remote_code: bool) -> fake_weights.Reading:
    """How the weights of a spec are loaded on a CPU."""
    stored, is_quantised = _stored(spec, trust_remote_code)
    computes = model.compute_dtype(spec) or torch.float32
    return fake_weights.Reading(
        stored=stored,
        unquantised=computes if model.is_quantised(spec) and not is_quantised else None,
        upcasts=spec.upcasts,
    )


def _stored(spec: TrialSpec, trust_remote_code: bool) -> tuple[torch.dtype, bool]:
    """The type that the checkpoint's weights are in, by its config, and whether they are quantised."""
    source = models.resolve(spec.base_model, spec.folder)
    if source.kind in ("bundled", "random"):
        return torch.bfloat16, False
    config: Any = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)
    return config.dtype or config.get_text_config().dtype or torch.float32, hasattr(config, "quantization_config")
