"""Predicts specs in a pool of processes, one per core: the runner imports no torch."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from harness import environment
from harness._util.messages import first_line
from harness._util.redact import redact
from harness.environment import DeviceType
from harness.errors import InputError
from harness.launch import fork_server
from harness.predict.cards import AMPERE, Capability
from harness.predict.prediction import Prediction, SpecPrediction, model_key
from harness.spec.keys import FULL
from harness.spec.trial import TrialSpec

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
"""In the names of a model's attention and its parts."""
_Key = tuple[str, str | None, DeviceType, Capability]
"""Memory key, folder that paths begin at, and device."""


class Predictor:
    """Predicts specs for a device, which this machine need not have. Processes start with the first spec.

    Use as a context manager: on exit, pending predictions are cancelled.

    Args:
        device_type: device to train on; null: each spec's own, resolved on this machine.
        capability: compute capability of a CUDA device, where none is given with the specs.
        full_length: as if every example filled the sequence.
        expandable_segments: of torch's allocator, by PYTORCH_CUDA_ALLOC_CONF.
        trust_remote_code: let models from the hub run their own code.
    """

    def __init__(
        self,
        device_type: DeviceType | None = None,
        *,
        capability: Capability = AMPERE,
        full_length: bool = False,
        expandable_segments: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._device_type = device_type
        self._capability = capability
        self._options = {
            "full_length": full_length,
            "expandable_segments": expandable_segments,
            "trust_remote_code": trust_remote_code,
        }
        self._pool: ProcessPoolExecutor | None = None
        self._held_open: Connection | None = None
        """Processes end when it is closed, those too that an interrupt has kept the pool from knowing."""
        self._answers: dict[_Key, dict[str, Any]] = {}
        """What processes returned."""

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def predict(self, specs: Iterable[TrialSpec], capability: Capability | None = None) -> Iterator[SpecPrediction]:
        """Predict each spec, in the order of completion. Specs that need equal memory and time are predicted once.

        Args:
            specs: of the trials.
            capability: compute capability of the device, where it is CUDA's; null: the predictor's.
        """
        capability = capability or self._capability
        groups: dict[_Key, list[TrialSpec]] = {}
        for spec in specs:
            device_type = self._device_type or environment.resolve_device(spec.device)
            groups.setdefault((spec.memory_key, spec.folder, device_type, capability), []).append(spec)
        running: dict[Future[dict[str, Any]], _Key] = {}
        for key in _by_model(groups):
            group = groups[key]
            if key in self._answers:
                yield from _spec_predictions(group, self._answers[key])
            else:
                text = group[0].model_dump_json()
                with fork_server.main_module_hidden():
                    running[self._executor().submit(_predict, text, *key[2:], self._options)] = key
        broken = []
        for future in as_completed(running):
            try:
                self._answers[running[future]] = future.result()
            except BrokenProcessPool:
                broken.append(running[future])
                continue
            yield from _spec_predictions(groups[running[future]], self._answers[running[future]])
        for key in broken:  # one at a time: a process that dies takes the whole pool with it
            self._answers[key] = self._predict_alone(groups[key][0], *key[2:])
            yield from _spec_predictions(groups[key], self._answers[key])

    def attention_layers(self, spec: TrialSpec) -> list[str]:
        """Names of the linear layers of the attention of a spec's model, as targets of adapters; none where they cannot
        be told.
        """
        with fork_server.main_module_hidden():
            arguments = (spec.model_dump_json(), self._options["trust_remote_code"])
            named = self._executor().submit(_attention_layers, *arguments)
        try:
            return named.result()
        except BrokenProcessPool:
            self._stop()
            return []

    def _predict_alone(self, spec: TrialSpec, device_type: DeviceType, capability: Capability) -> dict[str, Any]:
        self._stop()
        try:
            with fork_server.main_module_hidden():
                arguments = (spec.model_dump_json(), device_type, capability, self._options)
                return self._executor().submit(_predict, *arguments).result()
        except BrokenProcessPool:
            self._stop()
            return {"error": "the process that predicted it was killed"}

    def _stop(self) -> None:
        if self._pool is None:
            return
        # Private API of Python (3.11); `ProcessPoolExecutor.kill_workers` of Python 3.14 replaces it.
        for process in list(self._pool._processes.values()):
            process.kill()
        if self._held_open is not None:
            self._held_open.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def _executor(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = fork_server.start()
            theirs, self._held_open = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                os.cpu_count() or 1, mp_context=context, initializer=_begin, initargs=(theirs,)
            )
        return self._pool


def _by_model(groups: dict[_Key, list[TrialSpec]]) -> list[_Key]:
    """Keys, those of one model one after another, so that a process loads it once for them; models as they come."""
    of_models: dict[str, list[_Key]] = {}
    for key, group in groups.items():
        of_models.setdefault(model_key(group[0]), []).append(key)
    return [key for keys in of_models.values() for key in keys]


def _spec_predictions(specs: list[TrialSpec], answer: dict[str, Any]) -> Iterator[SpecPrediction]:
    prediction = None if "error" in answer else Prediction.model_validate(answer)
    for spec in specs:
        yield SpecPrediction(spec, prediction, answer.get("error"))


def _begin(held_open: Connection) -> None:
    """In the child: the runner alone handles interrupts, and this process ends when it is not wanted any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(10_000)  # a prediction makes many small objects, of which hardly any are in cycles
    _quiet()
    threading.Thread(target=_exit_at_eof, args=(held_open,), daemon=True).start()


def _quiet() -> None:
    """Log nothing: torch logs a traceback of every operation that has no shapes, and the answer has the error."""
    logging.disable()


def _exit_at_eof(held_open: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        held_open.recv_bytes()  # nothing is ever sent
    os._exit(1)


def _predict(text: str, device_type: DeviceType, capability: Capability, options: dict[str, bool]) -> dict[str, Any]:
    """In the child: the fields of a `Prediction`, or the first line of the error."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        try:
            from harness.predict import peak
        except Exception as error:  # a broken installation: the trial meets it too, and its log says more
            return {"error": f"{type(error).__name__}: {redact(first_line(error))}"}
        try:
            spec = TrialSpec.model_validate_json(text)
            prediction = peak.predict(spec, device_type, capability=capability, **options)
        except Exception as error:  # a model's own code may raise anything; other specs are still predicted
            first = redact(first_line(error))
            in_words = isinstance(error, (peak.Unpredictable, InputError))
            return {"error": first if in_words else f"{type(error).__name__}: {first}"}
    return prediction.model_dump(mode="json")


def _attention_layers(text: str, trust_remote_code: bool) -> list[str]:
    """In the child: the last part of each name, or the last two where other layers have it too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        try:
            from harness.training import adapter_targets, model

            plain = TrialSpec.model_validate_json(text).model_copy(update={"adapter": FULL, "loss": "full"})
            names = adapter_targets.linear_names(model.skeleton(plain, trust_remote_code=trust_remote_code))
        except Exception:  # as above; predictions say what it is
            return []
    return attention_among(names)


def attention_among(names: Sequence[str]) -> list[str]:
    """Those of the attention among whole names of layers, by the shortest ends that no other layer's name has."""
    others = {name.rpartition(".")[2] for name in names if not _ATTENTION.search(name)}
    ends = dict.fromkeys(tuple(name.split(".")[-2:]) for name in names if _ATTENTION.search(name))
    return list(dict.fromkeys(".".join(end) if end[-1] in others else end[-1] for end in ends))
