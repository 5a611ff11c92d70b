"use strict";
const { sections, runs, labels } = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#4269d0", "#e29a00", "#ff725c", "#4fb3a0", "#3ca951", "#e874a8", "#a463f2", "#9c6b4e"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const short = (value) => (value == null ? "–" : String(+value.toPrecision(4)));

function element(tag, parent, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  parent?.append(made);
  return made;
}

// Charts: a curve and its band for each run, over the iterations that any of them has.
const charts = [];
const last = Math.max(1, ...sections.flatMap((section) => section.charts.flatMap((chart) => chart.curves.map((curve) => curve.x.at(-1) ?? 0))));

function axisSize(chart, values, index, cycle) {
  const axis = chart.axes[index];
  if (cycle > 1) return axis._size;
  const longest = (values ?? []).reduce((a, b) => (b.length > a.length ? b : a), "");
  chart.ctx.font = axis.font[0];
  return Math.ceil(axis.ticks.size + axis.gap + chart.ctx.measureText(longest).width / devicePixelRatio + 4);
}

function draw(parent, { title, curves, top }) {
  const holder = element("div", parent, { className: runs.length > 1 ? "chart" : "chart one" });
  element("h3", holder, { textContent: title });
  const series = [{ label: "iteration", value: (_, value) => value ?? "" }];
  const [tables, bands] = [[], []];
  curves.forEach((curve, run) => {
    if (!curve.x.length) return;
    const [colour, at] = [COLOURS[run % 8], series.length];
    tables.push([curve.x, curve.y]);
    series.push({
      label: runs.length > 1 ? labels[run] : title.split("/").pop(),
      stroke: colour,
      width: 1.6,
      points: { show: curve.x.length < 25, size: 5 },
      // Of a run that has ended, its last.
      value: (chart, value, at, index) => short(value ?? chart.data[at].slice(0, (index ?? -1) + 1).findLast((y) => y != null)),
    });
    if (!curve.low || runs.length > 4) return; // the bands of many runs hide each other
    tables.at(-1).push(curve.high, curve.low);
    for (const label of ["high", "low"]) series.push({ label, class: "band", width: 0, points: { show: false } });
    bands.push({ series: [at + 1, at + 2], fill: `${colour}2e` });
  });
  const range = (_, low, high) => {
    if (top != null) [low, high] = [0, top];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [top != null ? 0 : low - margin, high + margin];
  };
  const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false, size: 0 } };
  const font = "11px system-ui, sans-serif";
  const options = {
    width: holder.clientWidth - 20,
    height: 190,
    series,
    bands,
    scales: { x: { time: false, min: 0, max: last }, y: { range } },
    axes: [
      { ...axis, font, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000] },
      { ...axis, font, size: axisSize, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : tick && Math.abs(tick) < 1e-4 ? tick.toExponential().replace("e-", "e−") : String(+tick.toPrecision(7)))) },
    ],
    cursor: { sync: { key: "iteration" }, drag: { x: true, y: false } },
  };
  const chart = new uPlot(options, tables.length > 1 ? uPlot.join(tables) : tables[0], holder);
  chart.over.addEventListener("mouseleave", rest);
  charts.push(chart);
  new ResizeObserver(() => chart.setSize({ width: holder.clientWidth - 20, height: 190 })).observe(holder);
}

// Where no pointer is, legends tell the last values.
function rest() {
  requestAnimationFrame(() => charts.forEach((chart) => chart.setLegend({ idx: chart.data[0].length - 1 })));
}

for (const holder of document.querySelectorAll("[data-section]"))
  for (const chart of sections[holder.dataset.section].charts) draw(holder, chart);
rest();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw()));

// Pictures.
function picture(parent) {
  const image = element("img", parent, { alt: "" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 96));
  return image;
}

function strip(holder) {
  const shown = runs.filter((run) => run.frames.length);
  if (!shown.length) return;
  const iterations = [...new Set(shown.flatMap((run) => run.frames.map((frame) => frame.iteration)))].sort((a, b) => a - b);
  holder.replaceChildren();
  const controls = element("div", holder, { className: "controls" });
  const play = element("button", controls, { textContent: "Play" });
  const slider = element("input", controls, { type: "range", min: 0, max: iterations.length - 1, value: iterations.length - 1 });
  slider.setAttribute("aria-label", "iteration");
  const output = element("output", controls);
  play.hidden = slider.hidden = iterations.length === 1;
  const cells = shown.flatMap((run) => {
    if (runs.length > 1) {
      const name = element("p", holder, { textContent: run.name });
      name.prepend(element("i", null, { className: `dot c${runs.indexOf(run) % 8}` }));
    }
    const grid = element("div", holder, { className: runs.length > 1 ? "strip row" : "strip" });
    return run.strip.map((prompt) => {
      const figure = element("figure", grid, { title: run.prompts[prompt] ?? "" });
      const image = picture(figure);
      if (runs.length === 1) element("p", figure, { textContent: run.prompts[prompt] ?? "" });
      return { run, prompt, image, caption: element("figcaption", figure) };
    });
  });
  const show = () => {
    const at = iterations[slider.value];
    output.textContent = `iteration ${at}`;
    for (const { run, prompt, image, caption } of cells) {
      const cell = run.frames.findLast((frame) => frame.iteration <= at && frame.pictures[prompt])?.pictures[prompt];
      if (!cell) continue;
      image.src = cell.src;
      caption.textContent = run.scores.map((name, i) => `${name} ${short(cell.scores[i])}`).join(" · ");
    }
  };
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value === iterations.length - 1) slider.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value === iterations.length - 1) stop();
    }, 700);
    show();
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  show();
}

function pairs(holder) {
  const shown = runs.filter((run) => run.frames.length > 1);
  if (!shown.length) return;
  holder.replaceChildren();
  const controls = element("div", holder, { className: "controls" });
  const choice = (label, options) => {
    const select = element("select", controls);
    select.setAttribute("aria-label", label);
    options.forEach((text, value) => element("option", select, { value, textContent: text }));
    select.addEventListener("change", () => show(12));
    return select;
  };
  const which = choice("run", shown.map((run) => run.name));
  which.hidden = shown.length === 1;
  const names = [...new Set(shown.flatMap((run) => run.scores))];
  const score = choice("score", ["all scores", ...names]);
  const order = choice("order", ["best change first", "worst change first", "in their order"]);
  const grid = element("div", holder, { className: "pairs" });
  const more = element("button", holder, { textContent: "Show more" });
  let count = 12;
  more.addEventListener("click", () => show(count + 36));

  const show = (limit) => {
    count = limit;
    const run = shown[which.value];
    const [before, after] = [run.frames[0], run.frames.at(-1)];
    const rows = Object.keys(after.pictures)
      .filter((prompt) => before.pictures[prompt])
      .map((prompt) => {
        const [from, to] = [before.pictures[prompt], after.pictures[prompt]];
        return { prompt, from, to, change: run.scores.map((_, i) => (to.scores[i] ?? NaN) - (from.scores[i] ?? NaN)) };
      });
    // Of all scores: in units of each one's spread over these prompts.
    const spread = run.scores.map((_, i) => Math.sqrt(rows.reduce((sum, row) => sum + (row.change[i] || 0) ** 2, 0) / rows.length) || 1);
    const key = (row) =>
      +score.value ? row.change[run.scores.indexOf(names[score.value - 1])] || 0 : row.change.reduce((sum, change, i) => sum + (change || 0) / spread[i], 0);
    if (+order.value < 2) rows.sort((a, b) => (key(b) - key(a)) * (+order.value ? -1 : 1));
    grid.replaceChildren();
    for (const { prompt, from, to, change } of rows.slice(0, count)) {
      const card = element("div", grid, { className: "pair" });
      card.dataset.prompt = prompt;
      const both = element("div", card);
      for (const [cell, when] of [[from, "before"], [to, `after ${after.iteration}`]]) {
        const figure = element("figure", both);
        picture(figure).src = cell.src;
        element("figcaption", figure, { textContent: when });
      }
      element("p", card, { textContent: run.prompts[prompt] ?? `prompt ${prompt}` });
      const table = element("table", card);
      run.scores.forEach((name, i) => {
        const row = element("tr", table);
        for (const text of [name, `${short(from.scores[i])} → ${short(to.scores[i])}`]) element("td", row, { textContent: text });
        const sign = change[i] > 0 ? "+" : "";
        const className = change[i] > 0 ? "good" : change[i] < 0 ? "bad" : "";
        element("td", row, { textContent: Number.isNaN(change[i]) ? "" : sign + short(change[i]), className });
      });
    }
    more.hidden = rows.length <= count;
  };
  show(12);
}

strip(document.getElementById("strip"));
pairs(document.getElementById("pairs"));

// Tables that sort by a column.
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].querySelectorAll("th").forEach((heading, column) => {
    let sign = 1;
    heading.addEventListener("click", () => {
      const text = (row) => row.cells[column].textContent.trim().replaceAll(",", "");
      const compare = (a, b) => parseFloat(text(b)) - parseFloat(text(a)) || text(a).localeCompare(text(b));
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => sign * compare(a, b)));
      sign = -sign;
    });
  });
