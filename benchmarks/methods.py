"""What each method of peft can do at each precision, found by trying: `harness methods` prints the table.

    python benchmarks/methods.py [--methods lora,loha] [--precisions fp32,nf4] [--write]

A small Llama is trained by each method at each precision, on a CPU: as a trial, with and without gradient
checkpointing, and sharded over two processes where nothing is quantised; its peak is held against the prediction; its
adapter is saved, loaded and merged. A method that trains without an error may still compute something else than it
should, on packed weights for one. So its logits, untrained and with weights that were trained in fp32, are held against
those in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from harness._util.messages import first_line
from harness.environment import current
from harness.errors import InputError
from harness.predict import peak
from harness.record import Job, Record
from harness.spec.capabilities import TABLE, Capabilities, Capability
from harness.spec.keys import ADAPTERS, QUANTISED
from harness.spec.trial import TrialSpec
from harness.training import adapter_methods, batches, checkpoints, half_matmul, model, order, saved_adapters, trial
from harness.training.batches import Batch
from harness.training.step import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import SMALL

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"num_virtual_tokens": 4} for name in ("prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 16},
    "cpt": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "gralora": {"r": 8},
    "hira": {"r": 8},
    "lily": {"r": 8},
    "miss": {"r": 16},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [10, 11, 12]},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 50},
}
"""Sizes that go with layers of 64 by 64."""
_CPU = torch.device("cpu")
_FAR = 0.25
"""Distance of logits from those in fp32, as a fraction of their norm, that rounding does not explain; that of nf4 is
0.08, and that of codes taken for weights 0.9 and more."""
_PACKAGES = ("peft", "torch", "transformers", "bitsandbytes")


def spec_of(method: str, precision: str, **others: Any) -> TrialSpec:
    """A spec that trains in a second; its rate is high, so that what was trained shows in the logits."""
    given = {"adapter": method, "adapter_options": OPTIONS.get(method), "precision": precision, "device": "cpu"}
    return TrialSpec.model_validate(SMALL | {"learning_rate": 0.02} | given | others)


def trained(spec: TrialSpec) -> tuple[Any, Batch]:
    """The model of a spec after two steps, and held-out examples."""
    torch.manual_seed(spec.seed)
    network = model.load(spec, _CPU)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    trainer = Trainer(network, spec, _CPU, 2)
    for step in order.optimizer_steps(spec, data.train)[:2]:
        trainer.step(list(batches.micro_batches(step, spec, 0, _CPU)))
    return network, batches.collate(data.held_out, 0, _CPU)


@torch.no_grad()
def logits(network: Any, spec: TrialSpec, held_out: Batch) -> torch.Tensor:
    """Of the tokens of some examples, without those of an adapter's prompt, in fp32."""
    was_training = network.training
    network.eval()
    inputs = {name: value for name, value in held_out.inputs.items() if name != "labels"}
    with model.autocast(spec, _CPU):
        made = network(**inputs).logits[:, -inputs["input_ids"].shape[1] :].float()
    network.train(was_training)
    return made


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of a from b, as a fraction of the norm of b."""
    return float((a - b).norm() / b.norm())


def what_fails(method: str, precision: str, record: Record) -> str | None:
    """Why a method does not train at a precision, or trains something else; null: it trains."""
    if record.status != "ok":
        return _without_name(record.error or record.status)
    if precision == "fp32":
        return None
    plain, spec = spec_of(method, "fp32"), spec_of(method, precision)
    reference, held_out = trained(plain)
    torch.manual_seed(spec.seed)
    network = model.load(spec, _CPU)
    torch.manual_seed(spec.seed)
    untrained = distance(logits(network, spec, held_out), logits(model.load(plain, _CPU), plain, held_out))
    weights = dict(reference.named_parameters()) | dict(reference.named_buffers())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in adapter_methods.tensor_names(network) and weights[name].shape == tensor.shape:
            tensor.data.copy_(weights[name].data)
    far = max(untrained, distance(logits(network, spec, held_out), logits(reference, plain, held_out)))
    return f"it computes something else than in fp32: its logits are off by {far:.0%}" if far > _FAR else None


def try_method(method: str, precision: str) -> Capability:
    """Try all that one method does at one precision in one process."""
    spec = spec_of(method, precision)
    record = run(spec)
    cell: dict[str, Any] = {"method": method, "precision": precision}
    if fails := what_fails(method, precision, record):
        return Capability(**cell, fails=fails)
    try:
        measured = record.metrics["peak_memory_bytes"] or 0
        cell["prediction_error"] = round(peak.predict(spec, "cpu").peak_memory_bytes / measured - 1, 6)
    except Exception as error:  # whatever it is, it is the finding
        known = isinstance(error, peak.Unpredictable | InputError)
        cell["not_predicted"] = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
    again = run(spec_of(method, precision, gradient_checkpointing=True))
    if again.status != "ok":
        cell["not_checkpointed"] = _without_name(again.error or again.status)
    elif abs(again.steps[-1].loss / record.steps[-1].loss - 1) > 1e-3:
        cell["not_checkpointed"] = "it trains something else then"
    network, held_out = trained(spec)
    reference = logits(network, spec, held_out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            saved_adapters.write(network, spec, Path(folder))
            loaded = saved_adapters.load(model.base(spec, _CPU), Path(folder))
            cell["reload_error"] = round(distance(logits(loaded, spec, held_out), reference), 6)
        except Exception as error:
            cell["not_reloaded"] = _without_name(first_line(error))
    try:
        cell["merge_error"] = round(distance(logits(saved_adapters.merged(network), spec, held_out), reference), 6)
    except Exception as error:
        cell["not_merged"] = _without_name(first_line(error))
    return Capability(**cell)


def run(spec: TrialSpec) -> Record:
    """A trial in this process."""
    return trial.run(Job(grid="methods", spec=spec, label="methods"), environment=current("cpu"))


def _without_name(text: str) -> str:
    """A reason without the words that say which method it is of."""
    return text.partition(": peft: ")[2] or text


def sharded(cells: Sequence[Capability]) -> Iterator[Capability]:
    """The cells, with whether each that is not quantised trains sharded over two processes."""
    from test_launch import go, grid_of

    from harness.launch.local import LocalLauncher
    from harness.results.store import Store

    chosen = [cell for cell in cells if cell.fails is None and cell.precision not in QUANTISED]
    keys = {"num_processes": 2, "sharding": "full_shard", "micro_batch_size": 1}
    grid = grid_of(**{f"{c.method}-{c.precision}": spec_of(c.method, c.precision, **keys) for c in chosen})
    with tempfile.TemporaryDirectory() as folder, LocalLauncher() as launcher:
        records = {record.label: record for record in go(grid, Store(Path(folder)), launcher).records}
    for cell in cells:
        record = records.get(f"{cell.method}-{cell.precision}")
        reason = None if record is None or record.status == "ok" else _without_name(record.error or record.status)
        yield cell.model_copy(update={"not_sharded": reason})


def main() -> None:
    """Try all that is asked for, say what was found, and write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--methods", default=",".join(ADAPTERS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--write", action="store_true", help="write the table that comes with the package")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    half_matmul.install()
    cells = []
    for method in given.methods.split(","):
        for precision in given.precisions.split(","):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cells.append(try_method(method, precision))
            print(json.dumps(cells[-1].model_dump(exclude_none=True)), flush=True)
    cells = list(sharded(cells))
    for cell in cells:
        if cell.not_sharded:
            print(f"{cell.method}, {cell.precision}, sharded: {cell.not_sharded}")
    if given.write:
        versions = tuple((name, importlib.metadata.version(name).partition("+")[0]) for name in _PACKAGES)
        text = Capabilities(versions=versions, cells=tuple(cells)).model_dump_json(indent=1, exclude_none=True)
        TABLE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
