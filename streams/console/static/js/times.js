// Times come as UTC; here they get the reader's zone, or how long ago they were.
const date = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
const DAY = 86_400_000;

export function ago(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 5) return "now";
  if (seconds < 100) return `${seconds} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} d ago`;
}

function text(element, now) {
  const moment = new Date(element.dateTime);
  if (Number.isNaN(moment.getTime())) return element.textContent;
  const age = now - moment.getTime();
  switch (element.dataset.form) {
    case "ago":
      return ago(age);
    case "clock":
      return age < DAY && age > -DAY ? clock.format(moment) : day.format(moment);
    default:
      return date.format(moment);
  }
}

export function dateText(milliseconds) {
  return date.format(new Date(milliseconds));
}

// Only what changes is written, so that a selection of the reader's stays.
export function refreshTimes(root = document) {
  const now = Date.now();
  for (const element of root.querySelectorAll("time[datetime]")) {
    const shown = text(element, now);
    if (element.textContent !== shown) element.textContent = shown;
    if (!element.title) element.title = `${full.format(new Date(element.dateTime))}\n${element.dateTime}`;
  }
}

export function startTimes() {
  refreshTimes();
  setInterval(() => {
    if (!document.hidden) refreshTimes();
  }, 1000);
}

// The value that <input type="datetime-local"> has for a moment, in the reader's zone.
export function localInput(milliseconds) {
  const moment = new Date(Math.floor(milliseconds / 1000) * 1000);
  const shifted = new Date(moment.getTime() - moment.getTimezoneOffset() * 60_000);
  return shifted.toISOString().slice(0, 19);
}
