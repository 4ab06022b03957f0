// The replay planner: where to → a plan, which changes nothing → execute.
import { address, finished, post } from "./api.js";
import { changed } from "./live.js";
import { count, dialog, make, note, plural } from "./ui.js";
import { dateText, localInput } from "./times.js";

let form;
let plan;

function target() {
  const how = form.how.value;
  if (how === "datetime") {
    const moment = new Date(form.moment.value).getTime();
    if (Number.isNaN(moment)) throw new Error("Say from which moment on: the field is empty or no time.");
    return { how, value: moment };
  }
  if (how === "duration") return { how, value: form.unit.value === "D" ? `P${form.amount.value}D` : `PT${form.amount.value}${form.unit.value}` };
  if (how === "offset" || how === "shift") {
    if (form[how].value === "") throw new Error("Give a whole number.");
    return { how, value: Number(form[how].value) };
  }
  return { how };
}

function partitions() {
  const boxes = [...form.querySelectorAll("input[name=partition]")];
  const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
  if (!chosen.length) throw new Error("Choose at least one partition.");
  return chosen.length === boxes.length ? undefined : chosen;
}

function showTarget() {
  for (const each of form.querySelectorAll("[data-for]")) {
    each.hidden = each.dataset.for !== form.how.value;
    for (const field of each.querySelectorAll("input, select")) field.disabled = each.hidden || (field.name === "slider" && !form.dataset.first);
  }
}

function fromSlider() {
  const first = Number(form.dataset.first);
  const last = Number(form.dataset.last);
  form.moment.value = localInput(first + (last - first) * (form.slider.value / 1000));
}

function toSlider() {
  const first = Number(form.dataset.first);
  const last = Number(form.dataset.last);
  const moment = new Date(form.moment.value).getTime();
  if (last > first && !Number.isNaN(moment)) form.slider.value = Math.round(1000 * (moment - first) / (last - first));
}

// --- the plan
const cell = (text, className) => make("td", { textContent: text, className: className ?? "num" });
const fact = (name, value) => make("div", { className: "fact" }, make("dt", { textContent: name }), make("dd", {}, make("b", { textContent: value })));

function table() {
  const heads = ["partition", "from", "to", "run again", "left out", ...(plan.state === "rebuild" ? ["for tables only"] : []), "note"];
  const head = make("tr", {}, ...heads.map((text, n) => make("th", { textContent: text, scope: "col", className: n && n < heads.length - 1 ? "num" : "" })));
  const rows = plan.moves.map((move) => make("tr", {},
    make("th", { textContent: `${move.topic}/${move.partition}`, scope: "row" }),
    cell(count(move.from)), cell(move.to === null ? "stays" : count(move.to)), cell(count(move.run_again)), cell(count(move.skipped)),
    ...(plan.state === "rebuild" ? [cell(count(move.rebuilt))] : []), cell(move.note ?? "", "wrap")));
  return make("div", { className: "panel scroll", tabIndex: 0, role: "group", "aria-label": "The plan by partition" },
    make("table", { className: "grid dense" }, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function showPlan() {
  const place = document.getElementById("plan");
  const moving = plan.moves.filter((move) => move.to !== null).length;
  const go = make("button", { type: "button", className: "primary", textContent: "Execute the plan", id: "execute" });
  go.disabled = !plan.can_execute || document.body.dataset.readOnly === "yes";
  go.addEventListener("click", confirm);
  const why = document.body.dataset.readOnly === "yes" ? "This console is read-only." : plan.why_not || "";
  place.replaceChildren(
    make("h2", { textContent: "The plan" }),
    make("dl", { className: "facts" }, fact("partitions that move", count(moving)), fact("rows that run again, at most", count(plan.run_again)), fact("rows that are left out, at most", count(plan.skipped)), ...(plan.state === "rebuild" ? [fact("rows for tables only, at most", count(plan.rebuilt))] : []), fact("tables", plan.state)),
    ...(plan.warnings ?? []).map((text) => make("p", { className: "notice tone-warn", textContent: text })),
    table(),
    make("p", { className: "muted pager", textContent: plan.run_again ? "Results of rows that run again appear once more. Counts, cost and tokens are sums: what runs again counts again." : "" }),
    make("div", { className: "planner-go" }, go, " ", make("span", { className: "muted", id: "why-not", textContent: plan.can_execute ? "" : why })));
  place.hidden = false;
  place.scrollIntoView({ block: "nearest" });
}

function confirm() {
  const { name, group } = form.dataset;
  dialog({
    title: `Move ${name}?`,
    body: [make("p", { textContent: `${plural(plan.moves.filter((move) => move.to !== null).length, "partition")} move. At most ${plural(plan.run_again, "row")} run again, and ${count(plan.skipped)} are left out. This cannot be undone, but it can be moved again.` })],
    ok: "Execute",
    isDanger: true,
    run: async () => {
      const done = await finished(group, await post(address("sessions", group, "replay", "execute"), { plan_id: plan.plan_id }));
      const failed = done.failed ?? [];
      if (failed.length) throw new Error(`${plural(failed.length, "partition")} were not moved: ${failed.map((each) => `${each.topic}/${each.partition}: ${each.message}`).join("; ")}. What has moved stays: make the plan again, and execute it.`);
      const place = document.getElementById("plan");
      place.replaceChildren(make("p", { className: "notice tone-busy" }, make("span", { textContent: `Done at ${dateText(Date.now())}: ${plural((done.moved ?? plan.moves).length, "partition")} moved. ` }), make("a", { href: `/sessions/${encodeURIComponent(group)}`, textContent: "See the session; if it is paused, resume it there." })));
      note(`${name} has moved`);
      changed();
    },
  });
}

async function onSubmit(event) {
  event.preventDefault();
  const problem = document.getElementById("replay-problem");
  const button = form.querySelector("button[type=submit]");
  problem.hidden = true;
  button.setAttribute("aria-busy", "true");
  try {
    const only = partitions();
    plan = await post(address("sessions", form.dataset.group, "replay", "plan"), { to: target(), state: form.state.value, ...(only ? { partitions: only } : {}) });
    showPlan();
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  } finally {
    button.removeAttribute("aria-busy");
  }
}

// A plan that could not be executed because workers ran is asked for again once they stand still.
function onRefreshed() {
  const standing = document.querySelector("#live .state")?.textContent;
  if (plan && !plan.can_execute && standing === "paused" && !document.getElementById("plan").hidden) form.requestSubmit();
}

export function startReplay() {
  form = document.getElementById("replay");
  if (!form) return;
  showTarget();
  if (form.dataset.first) fromSlider();
  form.addEventListener("change", (event) => event.target.name === "how" && showTarget());
  form.slider.addEventListener("input", fromSlider);
  form.moment.addEventListener("input", toSlider);
  form.addEventListener("change", (event) => {
    if (event.target.name !== "partition") return;
    const boxes = [...form.querySelectorAll("input[name=partition]")];
    const chosen = boxes.filter((box) => box.checked).length;
    form.querySelector("summary").textContent = chosen === boxes.length ? `all ${count(chosen)}` : `${count(chosen)} of ${count(boxes.length)}`;
  });
  form.addEventListener("submit", onSubmit);
  document.addEventListener("htmx:afterSwap", onRefreshed);
}
