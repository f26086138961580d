"""Does `harness plan --fix` rank by time as a clock does?

The lesson's configuration without checkpointing, on a model of an eighth of the 8B's widths and a quarter of its
layers, exceeds a budget on this CPU. For each proposal, whether it fits or not, its predicted and its measured time of
a token are printed, and Kendall's tau between the two orders.

    python benchmarks/fix_ranking.py [--model random:CONFIG.json] [--precision fp32] [--budget 0.7] [--rounds 5]
                                     [--seconds 4] [--fitting]

Proposals are timed in rounds, each of them once in every round, in random order: a drift of the machine's speed affects
all alike. Pairs count whose measured times differ by more than twice the standard error of their difference, from the
deviations between rounds, pooled over all proposals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from harness import environment
from harness.cli import plan_fix
from harness.cli.predictions import device_rates
from harness.predict import cards, peak
from harness.predict.predictor import Predictor
from harness.record import Job, Visit
from harness.report.predictions import Line, Plan
from harness.results import timing
from harness.spec.trial import TrialSpec
from harness.training import half_matmul, trial

TWIN = {
    "model_type": "llama",
    "vocab_size": 16_032,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
"""Llama-3.1-8B's shape, an eighth as wide."""


@dataclass(frozen=True)
class Candidate:
    """The configuration as it is, or a proposal."""

    name: str
    spec: TrialSpec
    predicted: float
    """Seconds per token."""


def candidates(spec: TrialSpec, budget: float, *, fitting: bool) -> list[Candidate]:
    """The trial as it is, and what is proposed for it.

    Args:
        spec: of the trial.
        budget: fraction of what it needs.
        fitting: those alone that fit.
    """
    prediction = peak.predict(spec, "cpu")
    line = Line("baseline", spec, prediction, None)
    plan = Plan("fix", "cpu", (line,), {"budget": int(budget * prediction.needed_bytes)}, rates=device_rates("cpu"))
    if plan.rates is None:
        raise SystemExit("the rates of this CPU are not known")
    with Predictor("cpu") as predictor, tempfile.TemporaryDirectory() as empty:
        here = environment.current("cpu")
        (proposed,) = plan_fix.propose(plan, predictor, cards.AMPERE, Path(empty), here)
    plan_fix.show(proposed, None)
    of_each = [Candidate(p.text, p.spec, p.seconds_per_token) for p in proposed.proposals
               if p.verdict == "fits" or not fitting]  # fmt: skip
    return [Candidate("as it is", spec, proposed.now_seconds), *of_each]


def seconds_of_token(spec: TrialSpec, seconds: float) -> float:
    """Measured in a visit of its own, over all positions."""
    job = Job(grid="fix", spec=spec, label="fix", visit=Visit(block=1, seconds=seconds))
    record = trial.run(job, environment=environment.current("cpu"))
    # Disturbed steps count: rounds show how much they differ.
    steps = [step.model_copy(update={"disturbed": False}) for step in record.steps]
    speed = timing.row_figures(steps)["padded_tokens_per_second"] if record.status == "ok" else None
    if not speed:
        raise SystemExit(f"a visit ended as {record.status}: {record.error}")
    return 1 / float(speed)


def measure(chosen: Sequence[Candidate], rounds: int, seconds: float) -> list[list[float]]:
    """Logarithms of each proposal's seconds of a token, one for each round."""
    measured: list[list[float]] = [[] for _ in chosen]
    for number in range(rounds):
        order = list(range(len(chosen)))
        random.Random(number).shuffle(order)
        for index in order:
            measured[index].append(math.log(seconds_of_token(chosen[index].spec, seconds)))
        print(f"round {number + 1} of {rounds} done", flush=True)
    return measured


def tau(predicted: Sequence[float], measured: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    """Kendall's tau over the pairs whose measured difference exceeds the noise; how many these are, and of how many."""
    rounds = len(measured[0])
    noise = math.sqrt(statistics.mean(statistics.variance(each) for each in measured))
    least = 2 * noise * math.sqrt(2 / rounds)
    means = [statistics.mean(each) for each in measured]
    pairs = list(itertools.combinations(range(len(means)), 2))
    counted = [(a, b) for a, b in pairs if abs(means[a] - means[b]) > least]
    agreeing = [(means[a] - means[b]) * (predicted[a] - predicted[b]) for a, b in counted]
    score = sum((x > 0) - (x < 0) for x in agreeing) / len(counted) if counted else math.nan
    return score, len(counted), len(pairs)


def main() -> None:
    """Make the twin's configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of the small 8B")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--budget", type=float, default=0.7, help="fraction of what the configuration needs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed steps in each visit")
    parser.add_argument("--fitting", action="store_true", help="those proposals alone that fit")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: 2 or more, since noise is what differs between rounds")
    half_matmul.install()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder, "config.json")
        twin.write_text(json.dumps(TWIN))
        spec = TrialSpec(
            base_model=given.model or f"random:{twin}",
            sequence_length=256,
            micro_batch_size=4,
            max_steps=4,
            val_set_size=0,
            lora_r=32,
            lora_dropout=0.05,
            precision=given.precision,
            device="cpu",
        )
        compare(spec, given)


def compare(spec: TrialSpec, given: argparse.Namespace) -> None:
    """Print each proposal's times, and tau."""
    chosen = candidates(spec, given.budget, fitting=given.fitting)
    measured = measure(chosen, given.rounds, given.seconds)
    predicted = [math.log(each.predicted) for each in chosen]
    now = statistics.mean(measured[0])
    print(f"\n{'proposal':<64} {'predicted':>9} {'measured':>9}  both in µs a token")
    for each, times in zip(chosen, measured, strict=True):
        mean = statistics.mean(times)
        both = f"{each.predicted * 1e6:.0f} and {math.exp(mean) * 1e6:.0f}"
        ratios = each.predicted / chosen[0].predicted, math.exp(mean - now)
        print(f"{each.name:<64} ×{ratios[0]:8.2f} ×{ratios[1]:8.2f}  {both}")
    score, counted, of = tau(predicted, measured)
    print(f"Kendall's tau {score:.2f} over {counted} of {of} pairs, whose measured times differ by more than noise")


if __name__ == "__main__":
    main()
