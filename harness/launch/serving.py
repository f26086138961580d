"""A trained model at work, in a process of its own: measured for the report, or telling a story."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import environment
from harness.errors import InputError
from harness.launch.isolated import isolated
from harness.launch.merging import Recorded, Trained, check_adapter
from harness.results import Inference, Model, Store
from harness.spec import TrialSpec


def measure(
    source: Recorded,
    *,
    rounds: int,
    told: int,
    most_tokens: int,
    hear: Callable[[tuple[int, int, str]], None],
    trust_remote_code: bool = False,
) -> Inference:
    """Time, judge and hear a trial's base, unmerged and merged model, and keep it beside the trial.

    Args:
        source: of a recorded trial.
        rounds: in each, every model is loaded anew and answers the same timed requests.
        told: held-out synopses of which a story is generated.
        most_tokens: of such a story.
        hear: told how many loads are done, of how many, and what is being done now.
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the adapter is none, does not fit, was trained elsewhere, or there are no held-out stories.
        OSError: the folder cannot be written.
    """
    here = environment.current(environment.resolve_device(source.spec.device)).id
    if here != source.row["environment_id"]:
        raise InputError(
            f"{source.name}: trained in environment {source.row['environment_id']}, and this is {here}; figures of two "
            "environments are not compared. Run the trial here first; merge and generate work with it all the same"
        )
    check_adapter(source.folder)
    options = {"rounds": rounds, "told": told, "most_tokens": most_tokens}
    found = Inference.model_validate(
        isolated(_measure, source.spec.model_dump_json(), str(source.folder), trust_remote_code, options, hear=hear)
    )
    Store(source.grid).write_inference(source.row, found)
    return found


def generate(
    source: Trained,
    synopsis: str | None,
    models: Sequence[Model],
    *,
    most_tokens: int,
    temperature: float,
    seed: int,
    hear: Callable[[Model | None, str], None],
    trust_remote_code: bool = False,
) -> None:
    """Let models tell a story, one after another.

    Args:
        source: the trained model.
        synopsis: of the story; null: the first held-out one.
        models: which of base, unmerged and merged.
        most_tokens: after which a story is cut.
        temperature: 0: the most likely token each time.
        seed: of the choice, above temperature 0.
        hear: told the synopsis first, of no model; then each piece of text as it comes, and whose it is.
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the adapter is none or does not fit, or there is nothing to tell of.
    """
    check_adapter(source.folder)
    options = {"most_tokens": most_tokens, "temperature": temperature, "seed": seed}
    text = source.spec.model_dump_json()
    isolated(
        _generate, text, str(source.folder), trust_remote_code, synopsis, tuple(models), options,
        hear=lambda said: hear(*said),
    )  # fmt: skip


def _measure(
    text: str, adapter: str, trust_remote_code: bool, options: dict[str, Any], say: Callable[[Any], None]
) -> dict[str, Any]:
    from harness import inference

    spec = TrialSpec.model_validate_json(text)
    workshop = inference.Workshop(spec, Path(adapter), trust_remote_code=trust_remote_code)
    return inference.measure(workshop, say=say, **options).model_dump(mode="json")


def _generate(
    text: str,
    adapter: str,
    trust_remote_code: bool,
    synopsis: str | None,
    models: Sequence[Model],
    options: dict[str, Any],
    say: Callable[[tuple[Model | None, str]], None],
) -> None:
    from harness import inference

    spec = TrialSpec.model_validate_json(text)
    workshop = inference.Workshop(spec, Path(adapter), trust_remote_code=trust_remote_code)
    asked, prompt = inference.question(workshop, synopsis)
    say((None, asked))
    for name in models:
        network, _ = workshop.make(name)

        def hear(piece: str, name: Model = name) -> None:
            say((name, piece))

        inference.tell(workshop, network, prompt, hear, **options)
        del network
