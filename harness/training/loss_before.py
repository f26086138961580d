"""Whether recorded losses of an untrained model are those that a trial would measure."""

from __future__ import annotations

from collections.abc import Sequence

from harness.record import LossesBefore
from harness.training.batches import Example


def reusable(recorded: LossesBefore | None, texts: Sequence[Example], kind: str) -> list[tuple[str, float, int]] | None:
    """Recorded losses of the texts as `evaluation.story_losses` gives them; null where they are to be measured anew.

    The recorded trial had the same `untrained_key`, data and base; the texts are compared one by one all the same.

    Args:
        recorded: losses of both kinds; null: none.
        texts: of this trial.
        kind: which of the recorded losses they are: `held-out` or `general`.
    """
    if recorded is None:
        return None
    losses = {s.story_id: (s.story_id, s.loss, s.tokens) for s in recorded.stories if s.kind == kind}
    if {(name, tokens) for name, _, tokens in losses.values()} != {(e.story_id, e.completion_tokens) for e in texts}:
        return None
    return [losses[example.story_id] for example in texts]
