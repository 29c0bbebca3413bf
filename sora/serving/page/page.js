// The page of one Sora server: its parts, and when they refresh.

import { $ } from "./dom.js";
import { refresh } from "./model.js";
import "./video.js";
import { showHistory, update } from "./answer.js";
import { refreshInbox } from "./review.js";

document.addEventListener("video-chosen", update);
document.addEventListener("model-changed", refreshInbox); // also the first time, once there are classes to choose from
$("origin").textContent = location.origin;
showHistory();
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 5000);
