"use strict";
// Everything that comes from outside (labels, file names, messages) enters the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const METRICS = [
  ["test/accuracy", "Accuracy on held-out videos"],
  ["test/macro_f1", "Macro F1"],
  ["test/ece", "Calibration error"],
];
let preview = null;
let busy = false;
let maxBytes = Infinity;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function authorization() {
  const token = sessionStorage.getItem("sora-token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function bytes(count) {
  return count >= 1e6 ? `${Math.round(count / 1e5) / 10} MB` : `${Math.max(1, Math.round(count / 1000))} kB`;
}

// The model: asked every few seconds while the page is looked at, so that a new champion shows by itself.

async function refresh() {
  try {
    const answer = await fetch("v1/model", { headers: authorization(), cache: "no-store" });
    if (answer.status === 401) return askForToken();
    const model = await answer.json();
    if (!answer.ok) return showState("down", model.detail);
    $("token-form").hidden = true;
    showModel(model);
  } catch {
    showState("down", "The server does not answer.");
  }
}

function showState(state, text) {
  $("state").dataset.state = state;
  if ($("state-text").textContent !== text) $("state-text").textContent = text; // a live region: speak changes only
}

function showModel(model) {
  maxBytes = model.limits.bytes;
  $("limits").textContent = `up to ${bytes(maxBytes)}, ${model.limits.seconds} s`;
  const following = model.following;
  if (model.version === null) {
    showState("loading", following.refused ? "No model: the champion was refused." : "No model yet.");
  } else {
    showState("ready", `Version ${model.version} is ready`);
  }
  const facts = [["Version", model.version === null ? "none yet" : String(model.version)]];
  if (model.data_version) facts.push(["Data version", model.data_version.slice(0, 12)]);
  if (model.since) facts.push(["Serving since", new Date(model.since).toLocaleString()]);
  if (model.clip) facts.push(["A clip", `${model.clip.frames} frames of ${model.clip.width} × ${model.clip.height}`]);
  for (const [name, title] of METRICS) {
    if (typeof model.metrics[name] === "number") facts.push([title, model.metrics[name].toFixed(3)]);
  }
  if (following.previous !== null) facts.push(["Previous version", String(following.previous)]);
  if (model.classes.length) facts.push([`${model.classes.length} classes`, model.classes.join(", "), "wide"]);
  if (following.refused) {
    facts.push([`Refused: version ${following.refused.version}`, following.refused.reason, "wide"]);
  }
  if (following.problem) facts.push(["Registry", following.problem, "wide"]);
  $("model").replaceChildren(...facts.map(([name, value, className]) => {
    const row = make("div", className);
    row.append(make("dt", "", name), make("dd", "", value));
    return row;
  }));
  update();
}

function askForToken() {
  showState("down", "A token is needed.");
  $("token-form").hidden = false;
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("sora-token", $("token").value.trim());
  $("token").value = "";
  refresh();
});

// The video.

function update() {
  $("send").disabled = busy || !$("file").files.length;
}

function chosen() {
  const file = $("file").files[0];
  if (preview) URL.revokeObjectURL(preview);
  preview = null;
  $("preview").hidden = true;
  $("prompt").replaceChildren(make("strong", "", "Choose a video"), " or drop it here");
  if (file) {
    $("prompt").replaceChildren(make("strong", "", file.name), ` (${bytes(file.size)})`);
    preview = URL.createObjectURL(file);
    $("preview").src = preview;
  }
  update();
}

$("preview").addEventListener("loadeddata", () => {
  $("preview").hidden = false;
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) $("preview").play().catch(() => {});
});
$("file").addEventListener("change", chosen);
$("file").addEventListener("focus", () => $("drop").classList.add("focus"));
$("file").addEventListener("blur", () => $("drop").classList.remove("focus"));
for (const name of ["dragenter", "dragover"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) $("drop").addEventListener(name, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) {
    $("file").files = event.dataTransfer.files;
    chosen();
  }
});

// The answer. XMLHttpRequest, since fetch tells nothing of an upload's progress.

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const file = $("file").files[0];
  if (!file || busy) return;
  if (file.size > maxBytes) {
    return showProblem({ title: "Too large", detail: `${file.name} has ${bytes(file.size)}.`, mend: `At most ${bytes(maxBytes)}.` });
  }
  const body = new FormData();
  body.append("file", file);
  const request = new XMLHttpRequest();
  request.open("POST", "v1/predict");
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  request.responseType = "json";
  request.upload.addEventListener("progress", (sent) => {
    if (sent.lengthComputable && sent.loaded < sent.total) $("progress").value = sent.loaded / sent.total;
    else $("progress").removeAttribute("value"); // decoding now: nobody knows how long
  });
  request.addEventListener("loadend", () => {
    working(false);
    if (request.status === 401) askForToken();
    if (request.status === 200 && request.response) showAnswer(request.response);
    else showProblem(request.response || { title: "No answer", detail: "The connection broke.", mend: "Try again." });
  });
  working(true);
  request.send(body);
});

function working(is) {
  busy = is;
  $("progress").value = 0;
  $("progress").hidden = !is;
  $("send").textContent = is ? "Working…" : "Classify";
  update();
}

function showAnswer(answer) {
  const bars = make("ul", "bars");
  const ranked = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  const fills = ranked.map(([name, share], rank) => {
    const row = make("li", rank === 0 ? "first" : "");
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = "0";
    track.append(fill);
    row.append(make("span", "name", name), make("span", "share", percent.format(share)), track);
    bars.append(row);
    return [fill, share];
  });
  const seconds = Object.values(answer.seconds).reduce((sum, value) => sum + value, 0);
  const clips = `${answer.clips} ${answer.clips === 1 ? "clip" : "clips"}`;
  $("result").replaceChildren(
    make("p", "label", answer.label),
    make("p", "quiet", answer.filename),
    bars,
    make("p", "quiet", `Version ${answer.version}, ${clips}, ${Math.max(1, Math.round(seconds * 1000))} ms`),
  );
  requestAnimationFrame(() => fills.forEach(([fill, share]) => { fill.style.width = `${share * 100}%`; }));
}

function showProblem(problem) {
  const box = make("div", "problem");
  box.append(make("strong", "", problem.title), make("p", "", problem.detail), make("p", "quiet", problem.mend));
  $("result").replaceChildren(box);
}

$("origin").textContent = location.origin;
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 5000);
