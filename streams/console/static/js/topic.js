// A topic: where to begin to look, and following its end. Everything from records is put in as text, never as HTML.
import { address } from "./api.js";
import { make, note, plural, prepare } from "./ui.js";
import { localInput, refreshTimes } from "./times.js";

const MOST = 200;
const LATEST_MS = 253_402_300_799_000; // the end of year 9999: producers may date their records as they like
const units = ["B", "KiB", "MiB", "GiB"];
function size(bytes) {
  let unit = 0;
  let left = bytes;
  while (left >= 1024 && unit < units.length - 1) { left /= 1024; unit += 1; }
  return `${unit ? left.toFixed(1) : left} ${units[unit]}`;
}

// --- the form
function startPeek(form) {
  const from = document.getElementById("peek-from");
  const offset = document.getElementById("peek-offset");
  const moment = document.getElementById("peek-moment");
  const show = () => {
    offset.hidden = from.value !== "offset";
    moment.hidden = from.value !== "time";
  };
  const field = moment.querySelector("input");
  field.value = localInput(Number(field.dataset.ms) || Date.now() - 3_600_000);
  from.addEventListener("change", show);
  form.addEventListener("submit", () => {
    const number = offset.querySelector("input").value;
    if (from.value === "offset") from.selectedOptions[0].value = number || "earliest";
    if (from.value === "time") from.selectedOptions[0].value = `time:${new Date(field.value).getTime() || 0}`;
  });
  show();
}

// --- records as they come
const NAMES = { json: "JSON", text: "Text", hex: "Hex" };

function bytes(it) {
  if (it === null) return make("p", { className: "muted", textContent: "null: there is no value" });
  const kinds = ["json", "text", "hex"].filter((kind) => it[kind] !== null && it[kind] !== undefined);
  const tabs = make("div", { className: "tabs" },
    make("div", { role: "tablist", "aria-label": "How to read the bytes" },
      ...kinds.map((kind) => make("button", { type: "button", role: "tab", textContent: NAMES[kind], data: { tab: kind } }))),
    make("span", { className: "muted", textContent: size(it.size) }));
  const panels = kinds.map((kind) => make("pre", { textContent: it[kind], tabIndex: 0, className: kind === "text" ? "wrap" : "", data: { panel: kind }, "aria-label": NAMES[kind] }));
  const cut = it.cut ? [make("p", { className: "muted", textContent: `… ${plural(it.cut, "more byte")}` })] : [];
  return make("div", { className: "bytes", data: { tabs: "" } }, tabs, ...panels, ...cut);
}

function headers(list) {
  if (!list.length) return make("p", { className: "muted", textContent: "none" });
  const rows = list.map((each) => make("tr", {},
    make("th", { scope: "row" }, make("code", { textContent: each.name })),
    make("td", {}, make("code", { className: "wrap", textContent: each.value === null ? "null" : each.value.text ?? each.value.hex }))));
  return make("div", { className: "scroll" }, make("table", { className: "plain" }, make("tbody", {}, ...rows)));
}

const brief = (it, none) => (it === null ? none : it.text ?? `${size(it.size)} that are no text`);

const part = (name) => make("h2", { className: "part", textContent: name });

function record(it) {
  const when = make("time", { dateTime: new Date(Math.min(Math.max(it.timestamp_ms, 0), LATEST_MS)).toISOString(), data: { form: "date" } });
  const summary = make("summary", {},
    make("code", { className: "record-place", textContent: `${it.partition}/${it.offset}` }), when,
    make("code", { className: "record-key clip", textContent: brief(it.key, "no key").slice(0, 80) }),
    make("code", { className: "record-value clip", textContent: brief(it.value, "null").slice(0, 300) }),
    make("span", { className: "unit record-size", textContent: it.value ? size(it.value.size) : "" }));
  const details = make("details", { className: "record panel is-new" }, summary);
  details.addEventListener("toggle", () => {
    details.append(make("div", { className: "record-body" },
      part("Key"), bytes(it.key), part("Value"), bytes(it.value), part("Headers"), headers(it.headers)));
    prepare(details);
  }, { once: true });
  return details;
}

function startTail(button) {
  const list = document.getElementById("records");
  const about = document.getElementById("tail-note");
  let source = null;
  let seen = 0;
  let dropped = 0;
  const tell = () => {
    about.textContent = `Following the end: ${plural(seen, "record")} so far, the newest on top${dropped ? `; ${plural(dropped, "record")} left out, as they come too fast to show` : ""}. Of more than ${MOST} the oldest leave the page.`;
  };
  const stop = (text) => {
    source?.close();
    source = null;
    button.setAttribute("aria-pressed", "false");
    button.querySelector("span").textContent = "Follow the end";
    if (text) about.textContent = text;
  };
  const start = () => {
    const partition = new URLSearchParams(location.search).get("partition");
    const query = partition ? `?partition=${encodeURIComponent(partition)}` : "";
    source = new EventSource(`${address("topics", button.dataset.topic, "tail")}${query}`);
    [seen, dropped] = [0, 0];
    list.replaceChildren();
    about.hidden = false;
    tell();
    button.setAttribute("aria-pressed", "true");
    button.querySelector("span").textContent = "Stop following";
    source.addEventListener("record", (event) => {
      const it = JSON.parse(event.data);
      seen += 1;
      list.prepend(record(it));
      while (list.children.length > MOST) list.lastElementChild.remove();
      refreshTimes(list.firstElementChild);
      tell();
    });
    source.addEventListener("dropped", (event) => {
      dropped += Number(JSON.parse(event.data).count ?? 1);
      tell();
    });
    source.addEventListener("failed", (event) => stop(`The topic cannot be followed now: ${JSON.parse(event.data).error?.message ?? "see the console's log"}`));
    source.addEventListener("end", () => stop("The console ended the following; it can be begun anew."));
    source.onerror = () => {
      if (source?.readyState === EventSource.CLOSED) {
        stop("The topic cannot be followed now.");
        note("The console ended the following; try again", true);
      }
    };
  };
  button.addEventListener("click", () => (source ? stop() : start()));
}

export function startTopic() {
  const form = document.getElementById("peek");
  const tail = document.getElementById("tail");
  if (form) startPeek(form);
  if (tail) startTail(tail);
}
