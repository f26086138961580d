"""Watches TRL's SFTTrainer on the bundled model and stories, beside the same training in a grid.

    pip install 'finetune-harness[trl]'
    harness run examples/watch.yml
    python examples/watch_trl.py
    python examples/watch_trl.py --plain-loss
    harness report results/watch

The examples and their order are those of the grid, so that the first losses are equal; a training of your own needs
none of that, only the callback (or `with harness.watch(trainer.model): trainer.train()`).

SFTTrainer has a head of its own, which never makes all logits and holds other buffers than the grid's `loss: chunked`;
with --plain-loss it computes the loss as transformers' Trainer does, which is the grid's `loss: full`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

import harness
from harness.grids import grid
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, order

GRID = Path(__file__).with_name("watch.yml")


class PlainLoss(SFTTrainer):
    """Without TRL's own head, and the figures that it logs of tokens."""

    compute_loss = Trainer.compute_loss


def make_trainer(spec: TrialSpec, output: str, *, plain_loss: bool, callbacks: list[TrainerCallback]) -> SFTTrainer:
    """SFTTrainer with the examples of a spec in the spec's order, and its model and settings."""
    tokenizer = checkpoints.load_tokenizer(spec)
    stories = batches.load(spec, tokenizer).train
    examples = [example for step in order.optimizer_steps(spec, stories) for example in step]
    rows = [{"input_ids": list(e.input_ids), "labels": e.labels} for e in examples]
    set_seed(spec.seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoints.checkpoint_folder(spec.base_model), dtype="float32")
    return (PlainLoss if plain_loss else SFTTrainer)(
        model,
        SFTConfig(
            output_dir=output,
            max_length=spec.sequence_length,
            per_device_train_batch_size=spec.micro_batch_size,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
            learning_rate=spec.learning_rate,
            lr_scheduler_type=spec.lr_scheduler,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=spec.gradient_checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=True,
            seed=spec.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=spec.lora_r, lora_alpha=spec.lora_alpha, target_modules=list(spec.lora_target_modules or ())
        ),
        callbacks=callbacks,
    )


def main() -> None:
    """Train, and record it beside the grid's trials."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--plain-loss", action="store_true", help="the loss of transformers' Trainer")
    parser.add_argument("--results", type=Path, help="folder of results; null: results/<name of the grid>")
    arguments = parser.parse_args()
    loaded = grid.load(arguments.grid)
    spec = next(trial.spec for trial in loaded.trials if trial.baseline)
    watch = harness.WatchCallback(
        "SFTTrainer, plain loss" if arguments.plain_loss else "SFTTrainer",
        results=arguments.results or Path("results") / loaded.name,
        spec=spec.model_copy(update={"loss": "full" if arguments.plain_loss else "chunked"}),
    )
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(spec, folder, plain_loss=arguments.plain_loss, callbacks=[watch]).train()


if __name__ == "__main__":
    main()
