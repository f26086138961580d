"""Multiple-choice tasks, asked and scored by lm-evaluation-harness. The one module that imports lm_eval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.record import ItemScore
from harness.sources import task_files
from harness.spec.trial import TrialSpec
from harness.training import limits
from harness.training.batches import Example

Losses = Callable[[Sequence[Example]], list[tuple[str, float, int]]]
"""See `evaluation.story_losses`."""
_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics of single questions that follow from the likelihoods of their answers."""


def check(spec: TrialSpec) -> None:
    """Check that the questions of a spec's tasks can be put.

    Raises:
        InputError: they cannot.
    """
    _all_built(spec)


def scores(
    spec: TrialSpec, tokenizer: Any, network: Any, losses: Losses, when: Literal["before", "after"]
) -> list[ItemScore]:
    """Ask each question of a spec's tasks, and score the answer that the model finds likeliest.

    Args:
        spec: of the trial.
        tokenizer: of the model.
        network: the model.
        losses: of examples by the model.
        when: before training, or after it.

    Returns:
        One score for each question, by the first metric of its task that is of single questions.

    Raises:
        InputError: a task is none.
    """
    from lm_eval import evaluator

    built = _all_built(spec)
    asked = _asker(tokenizer, losses, limits.of_model(network).positions)
    with _quiet():
        results = evaluator.evaluate(asked, {"tasks": built, "groups": {}}, bootstrap_iters=0, log_samples=True)
    answered = []
    for name, samples in results["samples"].items():
        metric = next(metric for metric in samples[0]["metrics"] if metric in _METRICS)
        answered += [
            ItemScore(task=name, item=int(each["doc_id"]), when=when, metric=metric, score=float(each[metric]))
            for each in samples
        ]
    return answered


def mean(items: Sequence[ItemScore]) -> float:
    """The mean over tasks of the mean over their questions."""
    of_tasks: dict[str, list[float]] = {}
    for item in items:
        of_tasks.setdefault(item.task, []).append(item.score)
    return sum(sum(each) / len(each) for each in of_tasks.values()) / len(of_tasks)


def _all_built(spec: TrialSpec) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for name in spec.evaluate_tasks or ():
        task = task_files.read(name, spec.folder)
        if task.name in built:
            raise InputError(f"evaluate_tasks: two tasks are called {task.name}")
        built[task.name] = _built(task)
    return built


def _built(task: task_files.TaskFile) -> Any:
    """lm-evaluation-harness's task, over rows that were read here: it would keep copies of them in its cache."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = {split: datasets.Dataset.from_list(of) for split, of in task.rows().items()}
    keys = {key: value for key, value in task.config.items() if key not in ("dataset_kwargs", "dataset_path")}
    config = keys | {"task": task.name, "custom_dataset": lambda **_: datasets.DatasetDict(rows)}
    if len(task.config.get("filter_list") or ()) > 1:
        raise InputError(f"evaluate_tasks {task.name}: filter_list has several filters; leave one")
    try:
        with _quiet():
            built = ConfigurableTask(config=config)
            for document in list(built.eval_docs)[:1]:
                built.doc_to_text(document), built.doc_to_choice(document), built.doc_to_target(document)
    except Exception as error:  # whatever its parts raise at what a file says
        raise InputError(one_line(f"evaluate_tasks {task.name}: {first_line(error)}")) from None
    if not any(metric in _METRICS for metric in built._metric_fn_list):
        given = ", ".join(built._metric_fn_list)
        raise InputError(f"evaluate_tasks {task.name}: metric {given}; give one of {', '.join(_METRICS)}")
    return built


def _asker(tokenizer: Any, losses: Losses, longest: int | None) -> Any:
    """The model as lm-evaluation-harness calls it: the log-likelihood of each answer after its question."""
    from lm_eval.api.model import TemplateLM

    class Asker(TemplateLM):  # type: ignore[misc]  # it has no types
        tokenizer_name = ""

        @property
        def eot_token_id(self) -> int:
            token = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
            return int(token or 0)

        @property
        def prefix_token_id(self) -> int:
            """What stands before an answer without a question."""
            return self.eot_token_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            encoded: list[int] = tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
            return encoded[:-1] if encoded and encoded[-1] == tokenizer.eos_token_id else encoded

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            examples = [_example(number, ids, answer, longest) for number, (_, ids, answer) in enumerate(requests)]
            examples.sort(key=len, reverse=True)  # those of one length stand together, without padding
            likelihoods = {int(name): -loss * count for name, loss, count in losses(examples)}
            return [(likelihoods[number], False) for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError  # of output types that are refused

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    return Asker()


def _example(number: int, question: list[int], answer: list[int], longest: int | None) -> Example:
    """An answer after its question, whose beginning is cut where the model has no positions for it."""
    ids = [*question, *answer]
    kept = ids if longest is None else ids[-longest:]
    return Example(str(number), tuple(kept), ((max(1, len(kept) - len(answer)), len(kept)),))


class _quiet:
    """Within, lm-evaluation-harness logs errors alone."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("lm_eval")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
