"""What a longer run would decide of the comparisons that are still open, and how long it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import pandas

from harness.analysis import pilot
from harness.analysis.comparison import Comparison
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.analysis.sizing import of_evaluation, show_time
from harness.analysis.timed import in_turn
from harness.analysis.undecided import Unit


def sentences(comparison: Comparison) -> list[str]:
    """For speeds and for losses, how many are open, and what would decide half of those that the same lack keeps open.

    Of comparisons with the baseline; nothing is said of a figure that nothing more decides. Times are those of the
    recorded trials, one after another on their machine.
    """
    lines = []
    for metric, name, one in (("tokens_per_second", "speeds", "speed"), ("eval_loss", "losses", "loss")):
        undecided = list(comparison.undecided(metric).values())
        more = _more(comparison.measurements, undecided)
        if more:
            of = len(comparison.estimates[metric])
            verb = "is" if len(undecided) == 1 else "are"
            which = f"The one {one} that is compared" if of == 1 else f"{len(undecided)} of {of} {name}"
            lines.append(f"{which} {verb} not decided; {more}.")
    return lines


def _more(m: Measurements, undecided: Sequence[Estimate]) -> str:
    """What of decides half of them, and how long that takes; empty: nothing would, or it is not known."""
    units = Counter(each.unit for each in undecided if each.unit is not None and each.needed is not None)
    if not units:
        return ""
    unit = units.most_common(1)[0][0]
    these = [each for each in undecided if each.unit == unit and each.needed is not None]
    wanted = sorted(each.needed or 0 for each in these)
    now = max((each.seeds or 1) if unit == "seeds" else 1 if unit == "times" else each.n for each in these)
    amount = max(wanted[(len(wanted) - 1) // 2], now + 1)
    decided = sum(number <= amount for number in wanted)
    what, seconds = _LONGER[unit](m, these, now, amount)
    time = "" if math.isnan(seconds) else f", in about {show_time(seconds)}"
    return f"{what} would decide {'it' if len(undecided) == 1 else f'{decided} of them'}{time}"


def _visits(m: Measurements, _: Collection[Estimate], now: int, amount: int) -> tuple[str, float]:
    block = _of_visits(m)["seconds"]
    seconds = float(block.sum(skipna=False)) if len(block) else math.nan
    of_trials = m.trials.loc[m.trials["timed_visits"] > 0, "timed_visits"]
    return f"{_instead('visits', amount, now, of_trials)} (visits)", (amount - now) * seconds


def _instead(unit: str, amount: int, now: int, there: pandas.Series) -> str:
    """How many of something it takes: more than most trials have, or those that there are, which not all count.

    Args:
        unit: its name.
        amount: how many a comparison needs.
        now: how many it has, of which a trial failed, say, or is still to come.
        there: how many each trial or configuration has.
    """
    usual = max(int(there.mode().iloc[-1]) if len(there) else 0, now)
    return f"{amount:,} {unit} instead of {usual}" if amount > usual else f"{usual:,} {unit} that all count"


def _of_visits(m: Measurements) -> pandas.DataFrame:
    """By timed trial, the `seconds` of a visit like those that were made, and how many `visits` these were.

    Each loads a model, warms up, and takes its steps; with those of the baseline in turn, that too.
    """
    ok = _trials(m)
    of_baseline = m.readings["trial"].isin(ok.index[ok["config"] == m.baseline])
    blocks = m.readings[m.readings["visit"] & m.readings["block"].isin(m.readings.loc[of_baseline, "block"])]
    timed = ok[ok.index.isin(blocks["trial"])]
    steps = 1 + timed["timed_steps"] / timed["timed_visits"]
    start = pilot.START_SECONDS + timed["load_seconds"]
    seconds = start + steps * timed["step_seconds_median"]
    if in_turn(m.readings):
        baseline = timed["config"] == m.baseline
        seconds += start[baseline].mean() + steps * timed.loc[baseline, "step_seconds_median"].mean()
    return pandas.DataFrame({"seconds": seconds, "visits": timed["timed_visits"]})


def _stories(m: Measurements, _: Collection[Estimate], now: int, amount: int) -> tuple[str, float]:
    what = f"{amount:,} held-out stories instead of {now} (val_set_size){_more_than_there_are(m, amount)}"
    return what, _again(m, stories=amount, times=1)


def stories_in_all(m: Measurements) -> float:
    """How many stories the data has, held out or trained on; nan where that is not recorded."""
    return float((m.trials["training_stories"] + m.trials["evaluated_stories"]).max())


def _seeds(m: Measurements, _: Collection[Estimate], now: int, amount: int) -> tuple[str, float]:
    trials = _trials(m)
    repeat = float(trials[~trials["twin"]].drop_duplicates("config")["seconds"].sum(skipna=False))
    of_configurations = m.trials.groupby("config")["repeat"].nunique()
    return f"{_instead('repeats', amount, now, of_configurations)} (repeats)", (amount - now) * repeat


def _times(m: Measurements, these: Collection[Estimate], _: int, amount: int) -> tuple[str, float]:
    stories, seeds = amount * max(each.n for each in these), amount * max(each.seeds or 1 for each in these)
    more = _more_than_there_are(m, stories)
    what = f"{stories:,} held-out stories (val_set_size){more} and {seeds:,} repeats (repeats)"
    return what, _again(m, stories=stories, times=amount)


def _more_than_there_are(m: Measurements, stories: int) -> str:
    """How many stories the data has, where holding out so many would leave none to train on."""
    there = stories_in_all(m)
    return f", more than the data has ({there:,.0f})," if stories >= there else ""


_LONGER: dict[Unit, Callable[[Measurements, Collection[Estimate], int, int], tuple[str, float]]] = {
    "visits": _visits,
    "stories": _stories,
    "seeds": _seeds,
    "times": _times,
}
"""More of each unit, in words, and the seconds that it takes (nan where that is not known): of the measurements, what
is undecided for lack of it, how much of it there is, and how much there would be."""


def _again(m: Measurements, *, stories: int, times: int) -> float:
    """Seconds of a grid with another number of held-out stories, and so many times the repeats.

    What its trials train on changes, so that all run again, and with them their visits. Both the visits and the
    baseline's second run are of the first repeat alone.
    """
    trials = _trials(m)
    timed = m.trials["step_seconds_median"]
    step = timed.fillna(timed.groupby(m.trials["config"]).transform("median"))  # later repeats are not timed
    a_story = of_evaluation(m, step)["text"].reindex(trials.index)
    seconds = trials["seconds"] + a_story * (stories - trials["evaluated_stories"])
    visits = _of_visits(m)
    all_trials = seconds * trials["twin"].map({True: 1, False: times})
    return float(all_trials.sum(skipna=False) + (visits["seconds"] * visits["visits"]).sum(skipna=False))


def _trials(m: Measurements) -> pandas.DataFrame:
    """The trials that ended well, with the `seconds` that each took; nan where that is not recorded."""
    ok = m.trials[m.trials["status"] == "ok"]
    return ok.assign(seconds=ok["trial_seconds"] + pilot.START_SECONDS)
