"""Merging: the merged model is the unmerged one, complete, and never half of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_launch import Watch

import harness
from harness.errors import InputError
from harness.grid import Grid, Trial
from harness.launch import merging, run_grid
from harness.launch.local import LocalLauncher
from harness.results import Store, spec_of
from harness.spec import TrialSpec

PRECISIONS = ("fp32", "bf16", "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, as one that was downloaded: its losses count, whatever they are worth."""
    from harness import model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(model._folder("random:tiny"), folder)
    model.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trained adapters of it."""
    folder = tmp_path_factory.mktemp("results")
    given = SMALL | {
        "base_model": str(base), "val_set_size": 6, "save_adapter": True, "learning_rate": 1e-2, "train_samples": 32,
        "lora_r": 8,
    }  # fmt: skip
    specs = {name: TrialSpec.model_validate(given | {"precision": name}) for name in PRECISIONS}
    grid = Grid("g", "G", "list", tuple(Trial(spec, name, None, None) for name, spec in specs.items()))
    with LocalLauncher() as launcher:
        run_grid(grid, Store(folder / "g"), launcher, Watch())
        yield folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_merged_is_unmerged(precision: str, results: Path, tmp_path: Path) -> None:
    source = merging.trained(results, precision)
    found = merging.merge(source, tmp_path / "m")
    losses = found["losses"]
    stories = len(losses["base"])
    before, unmerged, merged = (sum(losses[n]) / stories for n in ("base", "unmerged", "merged"))
    assert unmerged < before, "the adapter is in it"
    if precision == "fp32":
        assert found["largest_logit_difference"] <= 1e-4
        assert abs(merged - unmerged) <= 1e-4
    else:  # rounding of 16 bit; of 4 bit also that the base is another
        assert found["largest_logit_difference"] > 1e-4
        assert abs(merged - unmerged) < (0.02 if precision == "bf16" else 0.5)
        assert merged < before
    assert f"over {stories} held-out stories" in merging.cost(found)
    assert {f.name for f in (tmp_path / "m").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "merge.json", "generation_config.json",
    }  # fmt: skip
    card = (tmp_path / "m/README.md").read_text()
    assert "base_model: " in card
    assert "lora_r: 8" in card
    assert "| eval_loss |" in card
    assert not list(tmp_path.glob(".*"))


def test_both_load_elsewhere_and_say_the_same(base: Path, results: Path, tmp_path: Path) -> None:
    """In a process that has transformers and peft alone."""
    source = merging.trained(results, "fp32")
    merging.merge(source, tmp_path / "m")
    code = (
        "import sys, torch\n"
        "sys.modules['harness'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "merged, base, adapter = sys.argv[1:]\n"
        "tokenizer = AutoTokenizer.from_pretrained(merged)\n"
        "ids = tokenizer('A lighthouse keeper finds a letter.', return_tensors='pt', return_token_type_ids=False)\n"
        "one = AutoModelForCausalLM.from_pretrained(merged)\n"
        "plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)\n"
        "other = PeftModel.from_pretrained(plain, adapter)\n"
        "for model in (one, other):\n"
        "    made = model.generate(**ids, max_new_tokens=24, do_sample=False)\n"
        "    print(repr(tokenizer.decode(made[0, ids['input_ids'].shape[1]:])))\n"
    )
    given = [str(tmp_path / "m"), str(base), str(source.folder)]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    merged, unmerged = done.stdout.strip().splitlines()
    assert merged == unmerged
    assert len(merged) > 20


def test_merge_lora_as_the_lesson_calls_it(results: Path, tmp_path: Path) -> None:
    row = next(r for r in Store(results / "g").read("trials").to_pylist() if r["label"] == "bf16")
    given = {k: v for k, v in spec_of(row).canonical().items() if v is not None}
    (tmp_path / "config.yaml").write_text(json.dumps(given | {"output_dir": str(tmp_path / "out")}))
    adapter = results / "g/adapters" / row["adapter_id"]
    made = harness.merge_lora(config_path=tmp_path / "config.yaml", adapter_path=adapter)
    assert made == tmp_path / "out/merged"
    assert (made / "model.safetensors").is_file()
    with pytest.raises(InputError, match="there already"):
        harness.merge_lora(config_path=tmp_path / "config.yaml", adapter_path=adapter)


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(base: Path, results: Path, tmp_path: Path) -> None:
    source = merging.trained(results, "fp32")
    out = tmp_path / "m"

    def refused(folder: Path, match: str, spec: TrialSpec = source.spec) -> None:
        with pytest.raises(InputError, match=match) as error:
            merging.merge(merging.Trained(spec, folder, "x", {}), out)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("m*"))
        assert not list(tmp_path.glob(".*"))

    refused(tmp_path, "no adapter_config.json")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "wider.json").write_text(json.dumps(config | {"hidden_size": 128}))
    other = source.spec.model_copy(update={"base_model": f"random:{tmp_path / 'wider.json'}"})
    refused(source.folder, "does not fit the base LlamaForCausalLM", other)
    broken = tmp_path / "broken"
    shutil.copytree(source.folder, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"cut")
    refused(broken, r"SafetensorError|safetensors")
    (broken / "adapter_config.json").write_text("{}")
    refused(broken, "not a configuration of peft")
    for trial, match in (("nothing", "no trial"), ("g", "no trial")):
        with pytest.raises(InputError, match=match):
            merging.trained(results, trial)


def test_a_full_disk_and_a_kill_leave_nothing(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = merging.trained(results, "fp32")
    out = tmp_path / "models/m"
    monkeypatch.setattr(merging, "_merge", _on_a_full_disk)
    with pytest.raises(InputError, match=r"No space left|File too large"):
        merging.merge(source, out)
    assert not list(out.parent.iterdir())

    monkeypatch.setattr(merging, "_merge", _killed)
    with pytest.raises(InputError, match=r"ended by SIGKILL; the machine may have run out of memory"):
        merging.merge(source, out)
    assert not list(out.parent.iterdir())

    # A merge that was killed together with its runner: the next one clears up.
    (out.parent / ".m.1.aside").mkdir()
    monkeypatch.undo()
    merging.merge(source, out)
    assert [entry.name for entry in out.parent.iterdir()] == ["m"]


def _on_a_full_disk(*arguments: Any) -> Any:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    return merging._merge(*arguments)


def _killed(text: str, adapter: str, folder: str, *others: Any) -> Any:
    Path(folder).mkdir()
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
