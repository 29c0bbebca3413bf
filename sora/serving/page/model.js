// The model: requested every few seconds while the page is visible, so that a new champion shows by itself.

import { $, ask, bytes, make, say } from "./dom.js";

const METRICS = [
  ["test/accuracy", "Accuracy on held-out videos"], // of a multi-label model: of all labels of a video
  ["test/mean_average_precision", "Mean average precision"],
  ["test/macro_f1", "Macro F1"],
  ["test/ece", "Calibration error"],
];
export const model = { classes: [], version: null, multilabel: false, maxBytes: Infinity };
let card = null;

export async function refresh() {
  let found;
  try {
    found = await (await ask("v1/model")).json();
  } catch (problem) {
    if (problem.status !== 401) showState("down", problem.status ? problem.detail : "The server does not answer.");
    return;
  }
  $("token-form").hidden = true;
  const changed = found.version !== model.version;
  const { classes, version, multilabel, limits } = found;
  Object.assign(model, { classes, version, multilabel, maxBytes: limits.bytes });
  if (changed || !card) card = found.version === null ? null : await askForCard();
  show(found);
  if (changed) document.dispatchEvent(new CustomEvent("model-changed"));
}

async function askForCard() {
  try {
    return await (await ask("v1/card")).json();
  } catch {
    return null; // the next refresh asks again
  }
}

function showState(state, text) {
  $("state").dataset.state = state;
  say($("state-text"), text);
}

function show(found) {
  $("limits").textContent = `up to ${bytes(found.limits.bytes)}, ${found.limits.seconds} s`;
  const following = found.following;
  if (found.version === null) {
    showState("loading", following.refused ? "No model: the champion was refused." : "No model yet.");
  } else {
    showState("ready", `Version ${found.version} is ready`);
  }
  const facts = [["Version", found.version === null ? "none yet" : String(found.version)]];
  if (found.data_version) facts.push(["Data version", found.data_version.slice(0, 12)]);
  if (found.since) facts.push(["Serving since", new Date(found.since).toLocaleString()]);
  if (found.clip) facts.push(["A clip", `${found.clip.frames} frames of ${found.clip.width} × ${found.clip.height}`]);
  for (const [name, title] of METRICS) {
    if (typeof found.metrics[name] === "number") facts.push([title, found.metrics[name].toFixed(3)]);
  }
  if (following.previous !== null) facts.push(["Previous version", String(following.previous)]);
  if (card && card.decision) facts.push([`Decision: ${card.decision}`, card.reasons.join("; ") || "no reason stored", "wide"]);
  if (found.classes.length) facts.push([`${found.classes.length} classes`, found.classes.join(", "), "wide"]);
  if (following.refused) facts.push([`Refused: version ${following.refused.version}`, following.refused.reason, "wide"]);
  if (following.problem) facts.push(["Registry", following.problem, "wide"]);
  $("model").replaceChildren(...facts.map(([name, value, className]) => {
    const row = make("div", className);
    row.append(make("dt", "", name), make("dd", "", value));
    return row;
  }));
}

document.addEventListener("token-needed", () => {
  showState("down", "A token is needed.");
  $("token-form").hidden = false;
});

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("sora-token", $("token").value.trim());
  $("token").value = "";
  refresh();
});
