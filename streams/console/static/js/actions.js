// Pause, resume and cancel: recorded at once, carried out by workers within seconds, which the page then shows.
import { address, post } from "./api.js";
import { changed } from "./live.js";
import { dialog, make, note } from "./ui.js";

const WORDS = {
  pause: {
    title: (name) => `Pause ${name}?`,
    text: "Its workers finish and commit the rows in work, take no others, and wait. It stays paused, also through restarts, until it is resumed.",
    ok: "Pause",
    done: (name) => `${name}: pause is recorded. Its workers finish the rows in work, and wait.`,
  },
  resume: {
    done: (name) => `${name}: resume is recorded. Its workers go on within seconds.`,
  },
  cancel: {
    title: (name) => `Cancel ${name}?`,
    text: "Its workers commit what is done, give up the rows in work, and exit. The next start goes on from there.",
    ok: "Cancel the session",
    isDanger: true,
    done: (name) => `${name}: cancel is recorded. Its workers stop at once.`,
  },
};

function reasonField() {
  const field = make("input", { name: "reason", maxLength: 500, autocomplete: "off", placeholder: "shown to those who see it" });
  return make("label", { className: "field stacked" }, make("span", { textContent: "Reason (optional)" }), field);
}

async function request(action, group, name, reason) {
  await post(address("sessions", group, action), reason ? { reason } : {});
  note(WORDS[action].done(name));
  changed(0);
}

async function onAction(event) {
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const { action, group, name } = button.dataset;
  const words = WORDS[action];
  if (words.ok) {
    dialog({
      title: words.title(name),
      body: [make("p", { textContent: words.text }), reasonField()],
      ok: words.ok,
      isDanger: words.isDanger,
      run: (form) => request(action, group, name, form.reason.value.trim()),
    });
    return;
  }
  button.disabled = true;
  try {
    await request(action, group, name);
  } catch (error) {
    note(error.message, true);
  } finally {
    button.disabled = false;
  }
}

export function startActions() {
  document.addEventListener("click", onAction);
}
