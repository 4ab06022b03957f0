// Small things of every page: tabs of bytes, copying, the theme, filters, keys, notes, dialogs.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(element.dataset, value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const whole = new Intl.NumberFormat("en-US");
export const count = (number) => (number === null || number === undefined ? "–" : whole.format(number));
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

export function note(text, isBad = false) {
  const toast = make("p", { className: isBad ? "toast is-bad" : "toast", textContent: text });
  document.getElementById("toasts").append(toast);
  setTimeout(() => toast.remove(), isBad ? 12_000 : 5_000);
}

// --- a dialog: asks, and does what was asked for before it closes, so that an error shows where the reader looks
export function dialog({ title, body, ok, isDanger = false, run }) {
  const box = document.getElementById("dialog");
  const problem = document.getElementById("dialog-problem");
  const button = document.getElementById("dialog-ok");
  const form = box.querySelector("form");
  const opener = document.activeElement;
  document.getElementById("dialog-title").textContent = title;
  document.getElementById("dialog-body").replaceChildren(...body);
  button.textContent = ok ?? "OK";
  button.className = isDanger ? "danger" : "primary";
  button.hidden = !ok;
  button.disabled = false;
  problem.hidden = true;
  document.getElementById("dialog-cancel").textContent = ok ? "Cancel" : "Close";
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (button.disabled || !run) return;
    button.disabled = true;
    button.setAttribute("aria-busy", "true");
    try {
      await run(form);
      box.close();
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      button.disabled = false;
    } finally {
      button.removeAttribute("aria-busy");
    }
  };
  box.onclose = () => opener?.isConnected && opener.focus();
  if (!box.open) box.showModal();
  return { button, problem };
}

// --- what comes anew with each part of a page
export function prepare(root) {
  for (const element of root.querySelectorAll("[data-action], [data-copy], [data-one], [data-close-letter], #letter-actions, #tail, #replay, [data-windows], .charts, .tabs, input[name=pick], #pick-all, #theme")) {
    element.hidden = false;
  }
  for (const element of root.querySelectorAll("[data-needs-script]")) {
    element.hidden = false;
    element.disabled = false;
  }
  for (const box of root.querySelectorAll("[data-tabs]:not([data-ready])")) {
    box.dataset.ready = "yes";
    choose(box, box.querySelector("[data-tab]").dataset.tab);
  }
}

function choose(box, name) {
  for (const tab of box.querySelectorAll("[data-tab]")) {
    const isChosen = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
  }
  for (const panel of box.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== name;
}

function onTabs(event) {
  const tab = event.target.closest("[data-tab]");
  if (!tab) return;
  const box = tab.closest("[data-tabs]");
  if (event.type === "click") return choose(box, tab.dataset.tab);
  const tabs = [...box.querySelectorAll("[data-tab]")];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
  choose(box, next.dataset.tab);
  next.focus();
}

async function onCopy(event) {
  const button = event.target.closest("[data-copy], [data-copy-from]");
  if (!button) return;
  const from = button.dataset.copyFrom && document.getElementById(button.dataset.copyFrom);
  const text = from ? from.querySelector("[data-panel]:not([hidden])").textContent : button.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
    note("Copied");
  } catch {
    note("The browser does not let pages copy here: select the text instead", true);
  }
}

// --- the theme: as the system has it, light, dark
function startTheme() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const show = () => {
    const name = root.dataset.theme ?? "auto";
    button.querySelector("span").textContent = name;
    button.setAttribute("aria-label", `Theme: ${name}`);
    document.dispatchEvent(new Event("rowmill:theme"));
  };
  button.addEventListener("click", () => {
    const next = { auto: "light", light: "dark", dark: "auto" }[root.dataset.theme ?? "auto"];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("rowmill-theme", next);
    } catch {
      // It holds for this page then.
    }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

// --- filters: what is typed shows at once, and stands in the address
function startFilters() {
  const form = document.getElementById("filter");
  const live = document.getElementById("live");
  const apply = () => {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
    history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
    live.dispatchEvent(new CustomEvent("rowmill:changed"));
  };
  if (form && live) {
    let timer;
    form.addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(apply, event.target.type === "search" ? 250 : 0);
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      apply();
    });
  }
  document.addEventListener("change", (event) => {
    if (event.target.closest("#log-filter")) live.dispatchEvent(new CustomEvent("rowmill:changed"));
  });
}

// --- keys
const KEYS = [["/", "to the filter"], ["g s", "sessions"], ["g t", "topics"], ["?", "these keys"], ["Esc", "close"]];
let before = "";

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, dialog")) return;
  const key = before === "g" ? `g ${event.key}` : event.key;
  before = event.key;
  if (key === "/") {
    const field = document.querySelector("input[type=search]");
    if (field) {
      event.preventDefault();
      field.focus();
      field.select();
    }
  } else if (key === "g s") location.assign("/");
  else if (key === "g t") location.assign("/topics");
  else if (key === "?") {
    const rows = KEYS.map(([name, does]) => make("div", {}, make("dt", {}, make("kbd", { textContent: name })), make("dd", { textContent: does })));
    dialog({ title: "Keys", body: [make("dl", { className: "pairs" }, ...rows)] });
  }
}

export function startUi() {
  prepare(document);
  startTheme();
  startFilters();
  document.addEventListener("click", onTabs);
  document.addEventListener("keydown", onTabs);
  document.addEventListener("click", onCopy);
  document.addEventListener("keydown", onKey);
  document.getElementById("dialog-cancel")?.addEventListener("click", () => document.getElementById("dialog").close());
}
