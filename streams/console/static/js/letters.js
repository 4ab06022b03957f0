// Dead letters: a look into one beside the list, and retry or purge of some or of all that a filter finds. What would
// happen is asked first (a dry run), and shown before anything is done.
import { address, finished, post, watched } from "./api.js";
import { changed } from "./live.js";
import { count, dialog, make, note, plural, prepare } from "./ui.js";
import { refreshTimes } from "./times.js";

const SINCE_MS = { "15m": 900_000, "1h": 3_600_000, "24h": 86_400_000, "7d": 604_800_000 };
const WORDS = {
  retry: { verb: "Retry", done: "sent to their source again", text: "Their rows go back to the topic they came from, each exactly once, in a transaction with the mark that they are retried. A row that fails again becomes a new dead letter.", ok: (n) => `Retry ${plural(n, "row")}` },
  purge: { verb: "Purge", done: "purged", text: "They are marked as done with and leave this list. Their rows are not run again. The records stay on the topic until its retention ends.", ok: (n) => `Purge ${plural(n, "dead letter")}` },
};

function picked() {
  return [...document.querySelectorAll("input[name=pick]:checked")].map((box) => box.value);
}

function filterOfPage() {
  const query = new URLSearchParams(location.search);
  const filter = {};
  for (const name of ["stage", "type", "text"]) if (query.get(name)) filter[name] = query.get(name);
  const since = SINCE_MS[query.get("since")];
  if (since) filter.since_ms = Date.now() - since;
  return filter;
}

function described(filter, ids) {
  if (ids) return `${plural(ids.length, "dead letter")}: ${ids.slice(0, 4).join(", ")}${ids.length > 4 ? " …" : ""}`;
  const words = Object.entries(filter).map(([name, value]) => (name === "since_ms" ? `row not older than ${new Date(value).toLocaleString()}` : `${name} ${value}`));
  return words.length ? `all that wait with ${words.join(", ")}` : "all that wait";
}

function outcomeRows(outcome) {
  const rows = [make("p", {}, make("b", { textContent: count(outcome.matched) }), ` found, `, make("b", { textContent: count(outcome.count) }), " can be done")];
  for (const each of outcome.by_type ?? []) rows.push(make("p", { className: "muted", textContent: `${count(each.count)} × ${each.type || "error"}${each.stage ? ` in ${each.stage}` : ""}` }));
  const topics = Object.entries(outcome.targets ?? {});
  if (topics.length) rows.push(make("p", { className: "muted", textContent: `to ${topics.map(([topic, number]) => `${topic} (${count(number)})`).join(", ")}` }));
  for (const each of outcome.refused ?? []) rows.push(make("p", { className: "muted", textContent: `${plural(each.count ?? 1, "dead letter")} refused: ${each.reason}` }));
  return rows;
}

async function act(action, group, name, ids) {
  const words = WORDS[action];
  const what = ids ? { ids } : { filter: filterOfPage() };
  const body = make("div", { className: "muted", textContent: "Looking what would happen …" });
  const { button, problem } = dialog({
    title: `${words.verb} dead letters of ${name}`,
    body: [make("p", { textContent: described(what.filter, ids) }), body, make("p", { className: "muted", textContent: words.text })],
    ok: words.verb,
    isDanger: action === "purge",
    run: async () => {
      const doing = post(address("sessions", group, "dead-letters", action), { ...what, dry_run: false }).then((result) => finished(group, result));
      const outcome = await watched(group, doing, (done, total) => body.replaceChildren(make("p", { textContent: `${count(done)} of ${count(total)} done` })));
      note(`${plural(outcome.done, "dead letter")} ${words.done}${outcome.refusals ? `; ${count(outcome.refusals)} refused` : ""}`);
      closeLetter();
      if (!document.querySelector("#live")) location.assign(`/sessions/${encodeURIComponent(group)}/dead-letters`);
      changed();
    },
  });
  button.disabled = true;
  try {
    const outcome = await post(address("sessions", group, "dead-letters", action), { ...what, dry_run: true });
    body.className = "";
    body.replaceChildren(...outcomeRows(outcome));
    button.textContent = words.ok(outcome.count);
    button.disabled = outcome.count === 0;
  } catch (error) {
    body.replaceChildren();
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

function showPicked() {
  const box = document.getElementById("picked");
  if (!box) return;
  const number = picked().length;
  box.textContent = number ? `${count(number)} chosen` : "";
  for (const button of document.querySelectorAll("#letter-actions [data-letters-action]")) {
    const { verb } = WORDS[button.dataset.lettersAction];
    button.querySelector("span").textContent = number ? `${verb} ${count(number)} chosen` : `${verb} all of this filter`;
  }
}

// --- a look into one
function closeLetter() {
  const aside = document.querySelector("aside#letter");
  if (!aside) return;
  aside.replaceChildren();
  for (const row of document.querySelectorAll("tr.is-open")) row.classList.remove("is-open");
}

async function openLetter(link) {
  const aside = document.querySelector("aside#letter");
  const response = await fetch(link.dataset.letter, { credentials: "same-origin", headers: { Accept: "text/html" } });
  if (!response.ok) return location.assign(link.href);
  // It is HTML of our own server, escaped by its templates; the parser runs no script in it.
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  aside.replaceChildren(...page.body.children);
  for (const row of document.querySelectorAll("tr.is-open")) row.classList.remove("is-open");
  link.closest("tr").classList.add("is-open");
  prepare(aside);
  refreshTimes(aside);
  if (innerWidth < 1100) aside.scrollIntoView({ block: "start" });
  aside.focus({ preventScroll: true });
}

function onClick(event) {
  const button = event.target.closest("[data-letters-action]");
  if (button) {
    const place = button.closest("[data-letters]").dataset;
    const ids = button.dataset.one ? [button.dataset.one] : picked();
    act(button.dataset.lettersAction, place.letters, place.name, ids.length ? ids : null);
    return;
  }
  const link = event.target.closest("[data-letter]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && document.querySelector("aside#letter")) {
    event.preventDefault();
    openLetter(link).catch(() => location.assign(link.href));
  } else if (event.target.closest("[data-close-letter]")) closeLetter();
}

export function startLetters() {
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) closeLetter();
  });
  document.addEventListener("change", (event) => {
    if (event.target.id === "pick-all") {
      for (const box of document.querySelectorAll("input[name=pick]")) box.checked = event.target.checked;
    }
    showPicked();
  });
  document.addEventListener("htmx:afterSwap", showPicked);
}
