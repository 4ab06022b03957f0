// Charts of a session over time, drawn by uPlot from the API's columns.
import { address, get } from "./api.js";

const LEAST_MS = 4_000;
const HEIGHT = 158;
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en-US", { maximumFractionDigits: 2 });
const three = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

const number = (value) => (value === null || value === undefined ? "–" : Math.abs(value) < 100 ? fine.format(value) : whole.format(value));
const short = (value) => (Math.abs(value) < 1000 ? fine.format(value) : compact.format(value));
function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds === 0) return "0";
  if (seconds < 0.00095) return `${three.format(seconds * 1e6)} µs`;
  if (seconds < 0.95) return `${three.format(seconds * 1e3)} ms`;
  return seconds < 120 ? `${three.format(seconds)} s` : `${three.format(seconds / 60)} min`;
}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What each chart shows: series of label, colour, and the column's values.
const CHARTS = {
  rate: { series: (d) => [
    { label: "rows", colour: "--c1", fill: true, values: perSecond(d, d.rows) },
    { label: "results", colour: "--c2", values: perSecond(d, d.results) }], unit: number, axis: short, name: "Rows per second" },
  latency: { series: (d, stage) => ["p50", "p95", "p99"].map((label, n) => (
    { label, colour: ["--c2", "--c3", "--c4"][n], values: d.stages[stage]?.[label] ?? blank(d) })), unit: span, axis: span, name: "Latency" },
  lag: { series: (d) => [{ label: "lag", colour: "--c5", fill: true, values: d.lag }], unit: number, axis: short, name: "Lag in rows" },
  failures: { series: (d) => [{ label: "failed", colour: "--c4", bars: true, values: per(60, d, d.failures) }], unit: number, axis: short, name: "Failures per minute" },
  cost: { series: (d) => [{ label: "cost", colour: "--c3", fill: true, values: per(3600, d, d.cost) }], unit: number, axis: short, name: "Cost per hour" },
  tokens: { series: (d) => [{ label: "tokens", colour: "--c1", fill: true, values: perSecond(d, d.tokens) }], unit: number, axis: short, name: "Tokens per second" },
};
// A window that has not ended is divided by what has passed of it; events come up to a second late. In its first
// seconds that says nothing.
const LATE_SECONDS = 1.5;
function passed(data, n) {
  const seconds = Math.min(data.window_seconds, (Date.now() - data.at_ms[n]) / 1000 - LATE_SECONDS);
  return seconds < Math.min(4, data.window_seconds) ? null : seconds;
}
function per(unit, data, column) {
  return column.map((value, n) => {
    const seconds = value === null ? null : passed(data, n);
    return seconds === null ? null : Number(value) * unit / seconds;
  });
}
const perSecond = (data, column) => per(1, data, column);
const blank = (data) => data.at_ms.map(() => null);
const hour = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const moment = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const SPANS = { "10s": 900, "1m": 21_600, "1h": 604_800 };

// A window that is missing is a gap in the line, not a slope across it.
function evenly(data) {
  const step = data.window_seconds * 1000;
  const every = { ...data, at_ms: [], stages: {} };
  const columns = ["rows", "results", "failures", "lag", "cost", "tokens"];
  for (const name of columns) every[name] = [];
  for (const name of Object.keys(data.stages)) every.stages[name] = { p50: [], p95: [], p99: [] };
  const put = (at, n) => {
    every.at_ms.push(at);
    for (const name of columns) every[name].push(n === null ? null : data[name][n]);
    for (const [name, stage] of Object.entries(every.stages)) for (const p of ["p50", "p95", "p99"]) stage[p].push(n === null ? null : data.stages[name][p][n] ?? null);
  };
  data.at_ms.forEach((at, n) => {
    if (n > 0 && at - data.at_ms[n - 1] > 1.5 * step) put(data.at_ms[n - 1] + step, null);
    put(at, n);
  });
  return every;
}

// A figure without neighbours makes no line: it is drawn as a point.
function lonely(plot, n, show) {
  const values = plot.data[n];
  return show ? [...values.keys()].filter((at) => values[at] != null && values[at - 1] == null && values[at + 1] == null) : null;
}

// While the reader points at nothing, the legend tells the newest figures.
function newest(plot) {
  if (plot.data[0].length) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

class Charts {
  constructor(root) {
    this.root = root;
    this.group = root.dataset.charts;
    this.window = "10s";
    this.note = root.querySelector(".chart-note");
    this.select = root.querySelector("[data-stage]");
    this.plots = new Map();
    this.data = null;
    this.last = 0;
    this.sync = uPlot.sync("session");
  }

  start() {
    this.root.querySelector("[data-windows]").addEventListener("click", (event) => {
      const button = event.target.closest("[data-window]");
      if (!button) return;
      this.window = button.dataset.window;
      for (const each of this.root.querySelectorAll("[data-window]")) each.setAttribute("aria-pressed", String(each === button));
      this.rebuild();
      this.load();
    });
    this.select.addEventListener("change", () => { this.hasChosen = true; this.draw(); });
    document.addEventListener("rowmill:theme", () => { this.rebuild(); this.draw(); });
    document.addEventListener("rowmill:refreshed", () => Date.now() - this.last > LEAST_MS && this.load());
    new ResizeObserver(() => {
      for (const [box, plot] of this.plots) if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: HEIGHT });
    }).observe(this.root);
    this.load();
  }

  async load() {
    this.last = Date.now();
    try {
      const asked = this.window;
      const data = await get(`${address("sessions", this.group, "series")}?window=${asked}`);
      if (asked !== this.window) return;
      this.data = evenly(data);
      this.note.textContent = data.at_ms.length ? "" : "There is no history of this session for this time. It begins with the first events that the console hears.";
    } catch (error) {
      this.note.textContent = error.message;
      return;
    }
    this.stages();
    this.draw();
  }

  // The slowest stage is the one that people want to see first.
  stages() {
    const present = [...this.select.options].map((option) => option.value);
    for (const name of Object.keys(this.data.stages)) if (!present.includes(name)) this.select.add(new Option(name, name));
    if (this.hasChosen) return;
    const worst = (name) => Math.max(0, ...this.data.stages[name].p95.slice(-6));
    const names = Object.keys(this.data.stages).sort((a, b) => worst(b) - worst(a));
    if (names.length) {
      this.select.value = names[0];
      this.hasChosen = worst(names[0]) > 0;
    }
  }

  rebuild() {
    for (const plot of this.plots.values()) plot.destroy();
    this.plots.clear();
  }

  draw() {
    if (!this.data) return;
    const at = this.data.at_ms.map((ms) => ms / 1000);
    for (const box of this.root.querySelectorAll("[data-chart]")) {
      const kind = CHARTS[box.dataset.chart];
      const series = kind.series(this.data, this.select.value);
      const columns = [at, ...series.map((each) => each.values)];
      const plot = this.plots.get(box);
      if (plot) plot.setData(columns);
      else if (box.clientWidth) this.plots.set(box, new uPlot(this.options(box, kind, series), columns, box));
      const drawn = this.plots.get(box);
      if (drawn && !(drawn.cursor.left >= 0)) newest(drawn);
      this.label(box, kind, series);
    }
  }

  label(box, kind, series) {
    const newest = series.map((each) => `${each.label} ${kind.unit(each.values.findLast((value) => value !== null))}`);
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `${kind.name}, newest: ${newest.join(", ")}`);
  }

  options(box, kind, series) {
    const line = { stroke: colour("--line-soft"), width: 1 };
    const axis = { stroke: colour("--muted"), grid: line, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const seconds = SPANS[this.window];
    return {
      width: box.clientWidth,
      height: HEIGHT,
      padding: [8, 10, 0, 0],
      cursor: { sync: { key: this.sync.key }, y: false, drag: { x: true, y: false }, points: { size: 6 } },
      legend: { live: true },
      hooks: { setCursor: [(plot) => plot.cursor.left < 0 && newest(plot)] },
      scales: {
        x: { range: () => { const now = Date.now() / 1000; const end = Math.max(now, this.data.at_ms.at(-1) / 1000 || now); const newest = this.data.at_ms.at(-1) / 1000; const last = now - newest > seconds ? newest + 1 : end; return [last - seconds, last]; } },
        y: { range: (_, low, high) => [0, high > 0 ? high * 1.12 : 1] },
      },
      axes: [
        { ...axis, space: 74, size: 24, values: (_, values) => values.map((at) => (this.window === "1h" ? day : hour).format(new Date(at * 1000))) },
        { ...axis, size: 56, values: (_, values) => values.map(kind.axis), space: 30 },
      ],
      series: [
        { label: "at", value: (_, at) => (at === null ? "" : (this.window === "10s" ? clock : moment).format(new Date(at * 1000))) },
        ...series.map((each) => ({
          label: each.label,
          stroke: colour(each.colour),
          width: 1.6,
          fill: each.fill || each.bars ? `${colour(each.colour)}${each.bars ? "b0" : "22"}` : undefined,
          paths: each.bars ? uPlot.paths.bars({ size: [0.8, 14], align: 1 }) : undefined,
          points: { show: !each.bars, size: 5, filter: lonely },
          value: (_, value) => kind.unit(value),
        })),
      ],
    };
  }
}

export function startCharts() {
  const root = document.querySelector("[data-charts]");
  if (root) new Charts(root).start();
}
