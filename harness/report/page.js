"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const make = (tag, text, attributes = {}) => {
  const element = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) element.textContent = text;
  return element;
};

// ---- plots
const specs = read("charts");
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw(isDark) {
  const ink = isDark ? "#e6e9ec" : "#1b1f24", soft = isDark ? "#9aa4ae" : "#57606a", line = isDark ? "#343a41" : "#d8dee4";
  const config = {
    background: "transparent", font: "system-ui, sans-serif",
    axis: {labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal"},
    legend: {labelColor: ink, titleColor: ink}, title: {color: ink, anchor: "start", fontSize: 14, subtitleColor: soft},
    text: {color: ink}, view: {stroke: line},
  };
  return Promise.all([...document.querySelectorAll("[data-chart]")].map(place =>
    vegaEmbed(place, specs[place.dataset.chart], {config, actions: {export: true, source: false, compiled: false, editor: false}, renderer: "svg"})));
}
draw(dark.matches).then(() => { document.body.dataset.drawn = "yes"; });
dark.addEventListener("change", event => draw(event.matches));
addEventListener("beforeprint", () => draw(false));
addEventListener("afterprint", () => draw(dark.matches));

// ---- what fits in how much memory
const {choices, most, grid, unit, size} = read("choices");
const slider = document.getElementById("have");
if (slider) {
  const limited = [...document.querySelectorAll("[data-memory]")];
  // From nothing to a tenth more than the largest needs, in whole thousandths of it.
  const amount = () => Math.round(most * 1.1 * slider.value / 1000);
  const show = () => {
    const have = amount(), text = `${(have / size).toFixed(2)} ${unit}`;
    document.getElementById("amount").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const each of limited) each.classList.toggle("over", Number(each.dataset.memory) > have);
    const best = choices.findLast(choice => choice.memory <= have);
    document.getElementById("choice").textContent = best
      ? `Take ${best.label}${grid ? ` (${grid})` : ""}: it ${best.figures}.`
      : `Nothing measured${grid ? ` in ${grid}` : ""} fits; the least needs ${(choices[0].memory / size).toFixed(2)} ${unit}.`;
  };
  slider.addEventListener("input", show);
  show();
}

// ---- tables
const key = cell => cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
function inOrder(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return a.localeCompare(b, undefined, {numeric: true});
}
const rowsOf = table => [...table.tBodies[0].rows].filter(row => !row.classList.contains("detail"));
const detailOf = row => row.nextElementSibling?.classList.contains("detail") ? row.nextElementSibling : null;
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = rowsOf(table), open = new Map(rows.map(row => [row, detailOf(row)]));
    rows.sort((a, b) => (down ? -1 : 1) * inOrder(key(a.cells[column]), key(b.cells[column])));
    table.tBodies[0].append(...rows.flatMap(row => open.get(row) ? [row, open.get(row)] : [row]));
  }));
}
for (const field of document.querySelectorAll("[data-table]")) {
  const table = document.getElementById(field.dataset.table), rows = rowsOf(table);
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      if (detailOf(row)) detailOf(row).hidden = row.hidden;
      shown += !row.hidden;
    }
    field.nextElementSibling.textContent = wanted ? `${shown} of ${rows.length}` : "";
  });
  for (const box of field.parentElement.querySelectorAll("[data-column]")) {
    box.addEventListener("change", () => {
      const column = Number(box.dataset.column);
      for (const row of [table.tHead.rows[0], ...rows]) row.cells[column].hidden = !box.checked;
    });
  }
}

// ---- a row opens to its configuration
const opened = read("opened");
function curve(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 300 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  svg.setAttribute("aria-label", `Training loss from ${ys[0]} to ${ys.at(-1)} nats`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.map(([x, y]) =>
    `${300 * (x - left) / (right - left || 1)},${96 - 92 * (y - low) / (high - low || 1)}`).join(" "));
  for (const [name, value] of Object.entries({fill: "none", stroke: "var(--mark)", "stroke-width": 2, "vector-effect": "non-scaling-stroke"}))
    line.setAttribute(name, value);
  svg.append(line);
  const legend = make("p", `${high.toFixed(3)} to ${low.toFixed(3)} nats, over ${left.toLocaleString("en")} to ${right.toLocaleString("en")} tokens`, {className: "soft"});
  const block = make("div");
  block.append(make("h4", "Training loss by step"), svg, legend);
  return block;
}
function listed(title, pairs) {
  const block = make("div"), list = make("dl"), scroll = make("div", undefined, {className: "scroll", tabIndex: 0});
  for (const pair of pairs) list.append(...pair.map((text, at) => make(at ? "dd" : "dt", text)));
  scroll.append(list);
  block.append(make("h4", title), scroll);
  return block;
}
function inside(about) {
  const place = make("div", undefined, {className: "inside"}), first = make("div");
  first.append(make("h4", "Differs in"), make("p", about.differs));
  for (const end of about.ends) first.append(make("p", end));
  first.append(make("h4", "Configuration"), copyButton(), make("pre", about.yaml));
  place.append(first);
  if (about.losses.length > 1) place.append(curve(about.losses));
  if (about.figures.length) place.append(listed("Figures", about.figures));
  if (about.stories.length) place.append(listed("Loss by story (against the baseline)", about.stories.map(
    ([story, tokens, loss, difference]) => [`${story.slice(0, 10)}, ${tokens} tokens`, loss.toFixed(4) + (difference === null ? "" : ` (${difference > 0 ? "+" : ""}${difference.toFixed(4)})`)])));
  return place;
}
for (const button of document.querySelectorAll(".open")) {
  button.addEventListener("click", () => {
    const row = button.closest("tr"), detail = detailOf(row);
    button.setAttribute("aria-expanded", String(!detail));
    if (detail) return detail.remove();
    const added = make("tr", undefined, {className: "detail"}), cell = make("td", undefined, {colSpan: row.cells.length});
    cell.append(inside(opened[button.dataset.key]));
    added.append(cell);
    row.after(added);
  });
}

// ---- claims by verdict
for (const button of document.querySelectorAll(".filter")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    const words = new Set([...document.querySelectorAll(".filter[aria-pressed=true]")].map(each => each.dataset.word));
    for (const claim of document.querySelectorAll(".claim")) claim.hidden = !words.has(claim.dataset.word);
    for (const section of document.querySelectorAll(".claims")) section.hidden = !section.querySelector(".claim:not([hidden])");
  });
}

// ---- copying
function copyButton() {
  const button = make("button", "Copy", {type: "button", className: "copy"});
  listen(button);
  return button;
}
function listen(button) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.nextElementSibling.textContent);
    } catch {
      // Without access to the clipboard (a page opened from disk), select the text.
      getSelection().selectAllChildren(button.nextElementSibling);
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
document.querySelectorAll(".copy").forEach(listen);
