"""The inference benchmark and story generation, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import environment
from harness.adapters.trained import (
    RecordedAdapter,
    TrainedAdapter,
    check_adapter,
    kind,
    refuse_changed_base,
    refuse_changed_data,
)
from harness.errors import InputError
from harness.launch.isolated import run_isolated
from harness.record import InferenceRecord, Model
from harness.results.store import Store
from harness.spec import capabilities
from harness.spec.trial import TrialSpec


def measure(
    adapter: RecordedAdapter,
    *,
    rounds: int,
    generated_stories: int,
    most_tokens: int,
    on_progress: Callable[[tuple[int, int, str]], None],
    trust_remote_code: bool = False,
) -> InferenceRecord:
    """Measure speed, memory and loss of a trial's base, unmerged and merged model, and keep them with the trial.

    Args:
        adapter: of a recorded trial.
        rounds: in each, every model is loaded again and answers the same timed requests.
        generated_stories: held-out synopses for which a story is generated.
        most_tokens: of such a story.
        on_progress: called with (loads done, loads in all, what is next).
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the folder holds no adapter, it cannot be merged or does not fit its base, it was trained in another
            environment, its base or its data have changed since, or there are no held-out stories.
        OSError: the folder cannot be written.
    """
    here = environment.current(environment.resolve_device(adapter.spec.device)).id
    if here != adapter.row["environment_id"]:
        raise InputError(
            f"{adapter.name}: trained in environment {adapter.row['environment_id']}, and this is {here}; figures of "
            "two environments are not compared. Run the trial here first; merge and generate work with it all the same"
        )
    check_adapter(adapter.folder, to_merge=False)
    if reason := capabilities.why_not_merged(kind(adapter.folder)):
        raise InputError(
            f"{adapter.name}: evaluate compares it with a merged model, and there is none: {reason}. "
            "`harness generate` works with it, and `harness show` gives the trial's own losses"
        )
    refuse_changed_base(adapter)
    refuse_changed_data(adapter)
    options = {"rounds": rounds, "generated_stories": generated_stories, "most_tokens": most_tokens}
    spec = adapter.spec.model_dump_json()
    answer = run_isolated(
        _measure, spec, str(adapter.folder), trust_remote_code, options, on_progress=on_progress
    )  # fmt: skip
    inference = InferenceRecord.model_validate(answer)
    Store(adapter.results).write_inference(adapter.row, inference)
    return inference


def generate(
    adapter: TrainedAdapter,
    synopsis: str | None,
    models: Sequence[Model],
    *,
    most_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[Model | None, str], None],
    trust_remote_code: bool = False,
) -> None:
    """Generate a story with each of the models, one after another.

    Args:
        adapter: the trained adapter.
        synopsis: of the story; null: the first held-out one.
        models: which of base, unmerged and merged.
        most_tokens: after which a story is cut.
        temperature: 0: the most likely token each time.
        seed: of sampling, above temperature 0.
        on_text: called with the synopsis first (model null), then with each piece of text and its model.
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the folder holds no adapter, it does not fit its base, the base has changed since, or there is no
            synopsis.
    """
    check_adapter(adapter.folder, to_merge="merged" in models)
    refuse_changed_base(adapter)
    options = {"most_tokens": most_tokens, "temperature": temperature, "seed": seed}
    spec = adapter.spec.model_dump_json()
    run_isolated(
        _generate, spec, str(adapter.folder), trust_remote_code, synopsis, tuple(models), options,
        on_progress=lambda piece: on_text(*piece),
    )  # fmt: skip


def _measure(
    spec: str, adapter: str, trust_remote_code: bool, options: dict[str, Any], on_progress: Callable[[Any], None]
) -> dict[str, Any]:
    from harness.adapters import inference
    from harness.adapters.session import AdapterSession

    session = AdapterSession(TrialSpec.model_validate_json(spec), Path(adapter), trust_remote_code=trust_remote_code)
    return inference.measure(session, on_progress=on_progress, **options).model_dump(mode="json")


def _generate(
    spec: str,
    adapter: str,
    trust_remote_code: bool,
    synopsis: str | None,
    models: Sequence[Model],
    options: dict[str, Any],
    on_text: Callable[[tuple[Model | None, str]], None],
) -> None:
    from harness.adapters import generation
    from harness.adapters.session import AdapterSession

    session = AdapterSession(TrialSpec.model_validate_json(spec), Path(adapter), trust_remote_code=trust_remote_code)
    chosen, prompt = generation.prompt_of(session, synopsis)
    on_text((None, chosen))
    for name in models:
        network, _ = session.make(name)

        def send(piece: str, name: Model = name) -> None:
            on_text((name, piece))

        generation.generate_story(session, network, prompt, send, **options)
        del network
