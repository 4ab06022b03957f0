// When the console says that something changed, the part of the page that shows it is asked for anew and merged into
// what is there: what did not change stays untouched, and so do focus, selection, scroll position and open details.
const WATCH = document.body.dataset.watch ?? "none";
const GROUP = document.body.dataset.group ?? "";
const OF_A_SESSION = ["session", "replay", "letters"];
// Dead letters are read from their topic for each look; the rest is in the console's memory.
const LEAST_MS = WATCH === "letters" ? 3_000 : 1_000;
const SOON_MS = 100;
const SILENT_MS = 25_000;
// A browser has six connections to one address for all its tabs: those that nobody sees let go of theirs, or the
// seventh tab would wait for ever.
const HIDDEN_MS = 3_000;
let last = 0;
let timer = 0;
let due = Infinity;
let isWaiting = false;
let heardActivity;
let disconnect = null;

function onMessage(kind, message) {
  if (kind === "overview") {
    if (WATCH === "overview") changed();
  } else if (OF_A_SESSION.includes(WATCH)) {
    const { group, activity } = JSON.parse(message);
    if (group === GROUP) changed(activity !== undefined && activity !== heardActivity ? SOON_MS : LEAST_MS);
    heardActivity = activity;
  }
}

// What people wait for, a change of state, is shown at once; figures not more often than they can be read.
export function changed(least = LEAST_MS) {
  isWaiting = true;
  due = Math.min(due, Math.max(Date.now(), last + least));
  clearTimeout(timer);
  timer = setTimeout(refresh, due - Date.now());
}

// Neither for a page that nobody sees, nor while the reader marks some text in it.
function refresh() {
  const live = document.getElementById("live");
  due = Infinity;
  if (!live || document.hidden) return;
  const selection = getSelection();
  if (selection && !selection.isCollapsed && live.contains(selection.anchorNode)) {
    timer = setTimeout(refresh, LEAST_MS);
    return;
  }
  last = Date.now();
  isWaiting = false;
  live.dispatchEvent(new CustomEvent("rowmill:changed"));
  document.dispatchEvent(new Event("rowmill:refreshed"));
}

function show(state) {
  const box = document.getElementById("connection");
  if (!box || box.dataset.connection === state) return;
  box.dataset.connection = state;
  box.querySelector("span").textContent = { live: "live", lost: "reconnecting", off: "static" }[state];
}

function connect() {
  if (disconnect || document.hidden) return;
  let heard = Date.now();
  const query = OF_A_SESSION.includes(WATCH) ? `?group=${encodeURIComponent(GROUP)}` : "";
  const source = new EventSource(`/api/v1/live${query}`);
  const listen = (kind) => source.addEventListener(kind, (event) => {
    heard = Date.now();
    onMessage(kind, event.data);
  });
  source.onopen = () => {
    heard = Date.now();
    show("live");
    changed();
  };
  source.onerror = () => show("lost");
  ["overview", "session"].forEach(listen);
  source.addEventListener("beat", () => { heard = Date.now(); });
  // A browser tries again by itself, but not after every kind of end, and it does not notice silence.
  const watch = setInterval(() => {
    if (source.readyState !== EventSource.CLOSED && Date.now() - heard < SILENT_MS) return;
    show("lost");
    disconnect();
    setTimeout(connect, 2_000);
  }, 2_000);
  disconnect = () => {
    clearInterval(watch);
    source.close();
    disconnect = null;
  };
}

// Whoever comes back to a page sees how it is now: connecting asks for it.
function connectWhileSeen() {
  let leaving = 0;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(leaving);
    if (!document.hidden) connect();
    else leaving = setTimeout(() => disconnect?.(), HIDDEN_MS);
  });
  connect();
}

// What server and scripts each own: an open <details>, and parts that scripts draw, are not the server's.
function keepOurs() {
  Object.assign(Idiomorph.defaults.callbacks, {
    beforeNodeMorphed: (node) => !(node instanceof Element && node.hasAttribute("data-keep")),
    beforeAttributeUpdated: (name, node) => !(
      (name === "open" && node instanceof HTMLDetailsElement)
      || (name === "hidden" && node instanceof HTMLElement && !node.hasAttribute("hidden"))
      || (name === "title" && node instanceof HTMLTimeElement)
    ),
  });
}

// Figures change all the time and are not read out; that a session's state has changed is.
let state = "";
function announce() {
  const now = document.querySelector("#live .head .state, #live .standing .state")?.textContent ?? "";
  if (state && now !== state) document.getElementById("announced").textContent = `The session is ${now}`;
  state = now;
}

export function startLive(merged) {
  if (!document.getElementById("connection")) return;
  announce();
  document.addEventListener("htmx:afterSwap", () => {
    merged();
    announce();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && isWaiting) changed();
  });
  // htmx and Idiomorph are deferred scripts: they stand before this module, and have run.
  keepOurs();
  if (WATCH === "none") document.getElementById("connection").hidden = true;
  else if (WATCH === "topics") {
    document.getElementById("connection").hidden = true;
    setInterval(changed, 10_000);
  } else connectWhileSeen();
}
