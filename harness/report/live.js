"use strict";
// How far the run is, every two seconds; the page is loaded again when there is a newer one. Every text is set as text.
{
  const line = document.getElementById("live"), ended = document.getElementById("ended");
  // What changes with every step is outside of the status: a screen reader would read it out each time.
  const now = document.createElement("p");
  now.id = "now";
  now.className = "soft";
  line.after(now);
  // A reader who has sorted, filtered or opened something keeps it.
  const newer = document.createElement("p");
  now.after(newer);
  let lost = 0, touched = false;
  for (const kind of ["click", "input"]) document.querySelector("main").addEventListener(kind, () => { touched = true; });
  const set = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const count = (number, one, more) => number ? [`${number.toLocaleString("en")} ${number === 1 ? one : more}`] : [];
  const time = seconds => seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  const named = trial => trial.repeat ? `${trial.label} (repeat ${trial.repeat})` : trial.label;
  const doing = trial => trial.step !== null ? `, ${trial.timing ? "timing" : "training"}: step ${trial.step} of ${trial.of}`
    : trial.phase ? `: ${trial.phase}` : "";

  function show(state) {
    set(line, [
      state.finished ? "ended" : state.total ? `${state.done} of ${state.total} trials and visits done` : "beginning",
      ...(state.finished || state.seconds_left === null ? [] : [`about ${time(state.seconds_left)} left`]),
      ...count(state.failed, "failed", "failed"),
      ...count(state.disturbed_steps, "disturbed step", "disturbed steps"),
    ].join(" · "));
    const running = state.running.map(trial => named(trial) + doing(trial)).join("; ");
    set(now, [...(running ? [`running: ${running}`] : []), ...(state.note ? [state.note] : [])].join(" · "));
    if (ended) {
      const texts = state.ended.map(trial => `${named(trial)}: ${trial.status}. ${trial.line}`);
      while (ended.children.length > texts.length) ended.lastChild.remove();
      while (ended.children.length < texts.length) ended.append(document.createElement("li"));
      texts.forEach((text, at) => set(ended.children[at], text));
    }
  }

  async function ask() {
    if (document.hidden) return;  // a page that nobody sees costs the trial nothing
    try {
      const answer = await fetch("/state", {cache: "no-store"});
      const state = await answer.json();
      lost = 0;
      show(state);
      if (state.version !== line.dataset.version) {
        if (touched) set(newer, "there are newer rows: load the page again to see them");
        else location.reload();
      }
    } catch {
      lost += 1;
      set(line, "the run has ended or was stopped; this is the page of the rows until then");
      set(now, "");
    }
  }
  const often = setInterval(async () => {
    await ask();
    if (lost > 2) clearInterval(often);
  }, 2000);
  document.addEventListener("visibilitychange", ask);
  ask();
}
