// The answer: bars, timeline, what decided on demand, "this is wrong", and the last answers of this browser session.

import { $, UNREACHABLE, ask, authorization, button, bytes, choice, choices, make, needToken, percent, problemBox, say } from "./dom.js";
import { model } from "./model.js";
import { video } from "./video.js";

const KEPT = 10; // answers in the history
const STORE = "sora-answers";
const files = new Map(); // answer → its file, while the page lives: for explaining and correcting
let busy = false;

export function update() {
  $("send").disabled = busy || !video.file;
}

// XMLHttpRequest, since fetch does not report an upload's progress.
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const file = video.file;
  if (!file || busy) return;
  if (file.size > model.maxBytes) {
    return showProblem({
      title: "Too large", detail: `${file.name} has ${bytes(file.size)}.`, fix: `At most ${bytes(model.maxBytes)}.`,
    });
  }
  const request = new XMLHttpRequest();
  request.open("POST", "v1/predict");
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  request.responseType = "json";
  request.upload.addEventListener("progress", (sent) => {
    if (sent.lengthComputable && sent.loaded < sent.total) $("progress").value = sent.loaded / sent.total;
    else $("progress").removeAttribute("value"); // decoding now: for an unknown time
  });
  request.addEventListener("loadend", () => {
    working(false);
    if (request.status === 401) needToken();
    const answer = request.response; // read once: each access makes another object
    if (request.status === 200 && answer) {
      files.set(answer, file);
      remember(answer);
      show(answer);
    } else showProblem(answer || UNREACHABLE);
  });
  working(true);
  request.send(form({ file }));
});

function form(parts) {
  const body = new FormData();
  for (const [name, value] of Object.entries(parts)) body.append(name, value);
  return body;
}

function working(is) {
  busy = is;
  $("progress").value = 0;
  $("progress").hidden = !is;
  $("send").textContent = is ? "Working…" : "Classify";
  update();
}

function showProblem(problem) {
  $("result").replaceChildren(problemBox(problem));
  say($("said"), `${problem.title}. ${problem.detail}`);
}

// An answer in words. A multi-label model answers with all likely classes, or with none of them.
function named(answer) {
  if (!answer.labels) return answer.label;
  return answer.labels.length ? answer.labels.join(", ") : "None of the classes";
}

function show(answer) {
  const answered = answer.labels || [answer.label];
  const ranked = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  const bars = make("ul", "bars");
  const fills = ranked.map(([name, share]) => {
    const row = make("li", answered.includes(name) ? "first" : "");
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
  const parts = [make("p", "label", named(answer))];
  if (answer.labels) parts.push(make("p", "quiet", "Each class has its own probability; from 50% on it is a label."));
  if (answer.unsure) parts.push(make("p", "unsure", "Unsure: this model's confidence is too low. Check the video yourself."));
  parts.push(make("p", "quiet", answer.filename), bars);
  const times = Array.isArray(answer.timeline) && answer.timeline.length > 1 ? timeline(answer) : null;
  if (times) parts.push(times);
  if (times && answer.span) {
    const what = answer.labels ? `${answer.label}: decided` : "Decided";
    parts.push(make("p", "quiet", `${what} from ${answer.span.start.toFixed(1)} to ${answer.span.end.toFixed(1)} s.`));
  }
  parts.push(make("p", "quiet", `Version ${answer.version}, ${clips}, ${Math.max(1, Math.round(seconds * 1000))} ms`));
  if (files.has(answer)) parts.push(actions(answer, files.get(answer)));
  $("result").replaceChildren(...parts);
  $("why-card").hidden = true; // it was another answer's
  say($("said"), `${named(answer)}, ${percent.format(ranked[0][1])}${answer.unsure ? ", unsure" : ""}. ${answer.filename}`);
  requestAnimationFrame(() => fills.forEach(([fill, share]) => { fill.style.width = `${share * 100}%`; }));
}

// One segment per clip, as wide as it lasts; those of the answer's class stand out.
function timeline(answer) {
  const list = make("ol", "timeline");
  list.setAttribute("aria-label", "Answers over time");
  list.tabIndex = 0; // may be wider than the page: arrow keys scroll it
  for (const span of answer.timeline) {
    const item = make("li", span.label === answer.label ? "same" : "");
    item.style.flexGrow = String(Math.max(0.1, span.end - span.start));
    item.append(
      make("span", "when", `${span.start.toFixed(1)}–${span.end.toFixed(1)} s`),
      make("span", "name", span.label),
      make("span", "share", percent.format(span.probabilities[span.label])),
    );
    list.append(item);
  }
  return list;
}

function actions(answer, file) {
  const place = make("div", "more"); // the form of a correction, or what became of it
  const row = make("p", "row");
  const why = button("Show what decided", async () => {
    why.disabled = true;
    why.textContent = "Looking…";
    try {
      const found = await (await ask("v1/explain", { method: "POST", body: form({ file, label: answer.label }) })).json();
      $("why").replaceChildren(explanation(found));
      $("why-card").hidden = false;
      $("why-card").scrollIntoView({ block: "nearest" });
      say($("said"), `Heat map of ${found.label} is shown.`);
    } catch (problem) {
      place.replaceChildren(problemBox(problem));
      say($("said"), `${problem.title}. ${problem.detail}`);
    }
    why.textContent = "Show what decided";
    why.disabled = false;
  });
  const wrong = button("This is wrong…", () => {
    place.replaceChildren(correction(answer, file, place, wrong));
    place.querySelector("select").focus();
  });
  row.append(why);
  if (!$("inbox-card").hidden) row.append(wrong);
  const whole = make("div");
  whole.append(row, place);
  return whole;
}

function explanation(found) {
  const figure = make("figure");
  const scroller = make("div", "strip");
  scroller.tabIndex = 0; // wider than a phone: arrow keys scroll it
  scroller.setAttribute("role", "group");
  scroller.setAttribute("aria-label", "Frames and heat maps");
  const image = make("img");
  image.src = `data:image/png;base64,${found.strip}`;
  const frames = found.strip_frames.map((frame) => frame + 1).join(", ");
  image.alt = `Frames ${frames} of the clip, and below each the regions that speak for ${found.label}`;
  scroller.append(image);
  const weights = make("ol", "weights");
  weights.setAttribute("aria-label", "Share of each frame");
  if (found.weights.length > 32) weights.style.gap = "0";
  const most = Math.max(...found.weights, 1e-9);
  found.weights.forEach((weight, frame) => {
    const item = make("li");
    const bar = make("div", "fill");
    bar.style.height = `${(100 * weight) / most}%`;
    item.append(bar, make("span", "unseen", `Frame ${frame + 1}: ${percent.format(weight)}`));
    item.title = `Frame ${frame + 1}: ${percent.format(weight)}`;
    weights.append(item);
  });
  const clip = found.clips > 1 ? `Clip ${found.clip + 1} of ${found.clips}. ` : "";
  const heaviest = found.weights.indexOf(Math.max(...found.weights)) + 1;
  const caption = make("figcaption", "quiet",
    `${clip}Bright: speaks for ${found.label}. Bars: each frame's share, most in frame ${heaviest} of ${found.weights.length}. ${found.method}.`);
  figure.append(scroller, weights, caption);
  return figure;
}

function correction(answer, file, place, opener) {
  const box = make("form", "correction");
  const several = Boolean(answer.labels);
  const others = model.classes.filter((name) => several || name !== answer.label);
  const label = several ? choices(others, answer.labels, "The right labels") : choice(others, others[0], "The right class");
  const send = make("button", "", "Send");
  const line = make("p", "row");
  const cancel = button("Cancel", () => {
    place.replaceChildren();
    opener.focus();
  });
  line.append(make("span", "", "It is"), label, send, cancel);
  box.append(line, make("p", "quiet", "The clip is kept for review. The model learns nothing from it until somebody accepts it."));
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    const right = [...label.selectedOptions].map((option) => option.value).join("|"); // one, if only one can be chosen
    if (!right) return label.focus();
    send.disabled = true;
    const predicted = several ? answer.labels.join("|") || answer.label : answer.label;
    const said = { file, label: right, predicted, version: answer.version };
    try {
      await ask("v1/corrections", { method: "POST", body: form(said) });
      const done = make("p", "done", `Thank you: kept as ${right}, for review.`);
      done.tabIndex = -1;
      place.replaceChildren(done);
      done.focus(); // with the form it would jump to the top of the page
      say($("said"), done.textContent);
      document.dispatchEvent(new CustomEvent("corrected"));
    } catch (problem) {
      place.replaceChildren(problemBox(problem));
      say($("said"), `${problem.title}. ${problem.detail}`);
    }
  });
  return box;
}

// The history: kept in this tab only, without the videos.

let answers = [];
try {
  answers = JSON.parse(sessionStorage.getItem(STORE)) || [];
} catch {
  answers = [];
}

function remember(answer) {
  answer.at = new Date().toISOString();
  answers = [answer, ...answers].slice(0, KEPT);
  for (const old of files.keys()) if (!answers.includes(old)) files.delete(old);
  try {
    sessionStorage.setItem(STORE, JSON.stringify(answers));
  } catch {
    // No room or not allowed: the list lives as long as the page.
  }
  showHistory();
}

export function showHistory() {
  $("history-card").hidden = !answers.length;
  $("history").replaceChildren(...answers.map((answer) => {
    const item = make("li");
    const open = button("", () => {
      show(answer);
      $("answer").focus();
    }, "entry");
    open.append(
      make("strong", "", answer.unsure ? `${named(answer)}?` : named(answer)),
      make("span", "share", percent.format(answer.probabilities[answer.label])),
      make("span", "name quiet", answer.filename),
      make("span", "quiet", `version ${answer.version}, ${new Date(answer.at).toLocaleTimeString()}`),
    );
    item.append(open);
    return item;
  }));
}
