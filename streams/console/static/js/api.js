// Questions to the JSON API. An error has the text that says who acts next.
export const group = document.body.dataset.group ?? "";
export const isReadOnly = document.body.dataset.readOnly === "yes";

export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message || `The console answered ${status}.`);
    this.status = status;
  }
}

export function address(...words) {
  return `/api/v1/${words.map(encodeURIComponent).join("/")}`;
}

async function answer(response) {
  const isJson = (response.headers.get("content-type") ?? "").startsWith("application/json");
  const body = isJson ? await response.json() : null;
  if (response.status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  if (!response.ok) throw new Refusal(response.status, body?.error);
  return body;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("The console does not answer. Is `rowmill console` still running?");
  }
  return answer(response);
}

export function get(path) {
  return ask(path, { headers: { Accept: "application/json" } });
}

export function post(path, body) {
  const csrf = document.querySelector('meta[name="rowmill-csrf"]')?.content ?? "";
  return ask(path, {
    method: "POST",
    headers: { Accept: "application/json", "Content-Type": "application/json", "X-Rowmill-CSRF": csrf },
    body: JSON.stringify(body),
  });
}

// How far it is, told every second until the promise has settled: to the one who waits for it.
export function watched(group, promise, tell) {
  const timer = setInterval(async () => {
    try {
      const { operation } = await get(address("sessions", group, "operation"));
      if (operation?.running && operation.total) tell(operation.done, operation.total);
    } catch {
      // The promise itself says what is wrong.
    }
  }, 1_000);
  return promise.finally(() => clearInterval(timer));
}

// What takes longer than a request waits goes on in the console, and is asked about until it has ended.
export async function finished(group, result) {
  let last = result;
  while (last.running) {
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    const { operation } = await get(address("sessions", group, "operation"));
    if (!operation) throw new Error("The console was started anew meanwhile: look whether it was done.");
    if (operation.error) throw new Refusal(409, operation.error.error ?? operation.error);
    if (!operation.running) return operation.result;
    last = operation;
  }
  return last;
}
