// What every page does; a page's own part begins only where its elements are.
import { startActions } from "./actions.js";
import { startCharts } from "./charts.js";
import { startLetters } from "./letters.js";
import { startLive } from "./live.js";
import { startReplay } from "./replay.js";
import { startTopic } from "./topic.js";
import { refreshTimes, startTimes } from "./times.js";
import { prepare, startUi } from "./ui.js";

startUi();
startTimes();
startActions();
startLetters();
startReplay();
startTopic();
startCharts();
startLive(() => {
  refreshTimes();
  prepare(document);
});
