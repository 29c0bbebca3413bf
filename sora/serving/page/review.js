// The inbox of corrections: listed, played, accepted into data/ or rejected.

import { $, ask, button, bytes, choice, make, say } from "./dom.js";
import { model } from "./model.js";

export async function refreshInbox() {
  let found;
  try {
    found = await (await ask("v1/corrections")).json();
  } catch {
    $("inbox-card").hidden = true; // this server takes no corrections, or this caller may not review them
    return;
  }
  $("inbox-card").hidden = false;
  $("inbox").replaceChildren(...found.entries.map(row));
  $("inbox-nothing").hidden = found.entries.length > 0;
}

function row(entry) {
  const item = make("li");
  const player = make("div", "player");
  // Several labels that were sent for one clip are one choice besides the single ones.
  const names = model.classes.includes(entry.label) ? model.classes : [entry.label, ...model.classes];
  const label = choice(names, entry.label, `The right class of ${entry.filename}`);
  const facts = make("div", "facts");
  const others = Object.keys(entry.said).filter((name) => name !== entry.label);
  facts.append(
    make("strong", "", entry.label),
    make("span", "quiet", ` reported for ${entry.filename}; version ${entry.version} answered ${entry.predicted}`),
    make("p", "quiet", `${new Date(entry.received).toLocaleString()}, ${bytes(entry.bytes)}, ${entry.id.slice(0, 12)}`),
  );
  if (others.length) facts.append(make("p", "quiet", `Others said: ${others.join(", ")}`));
  for (const { name, accepted, refused, often_refused: often } of entry.sent_by) {
    const reviewed = accepted + refused;
    const record = reviewed ? `: ${refused} of ${reviewed} reviewed corrections refused` : "";
    facts.append(make("p", often ? "warning" : "quiet", `${often ? "Refused often: " : "Sent by "}${name}${record}`));
  }
  const act = async (verb, query, done) => {
    for (const control of item.querySelectorAll("button, select")) control.disabled = true;
    try {
      const answer = await (await ask(`v1/corrections/${entry.id}/${verb}${query}`, { method: "POST" })).json();
      say($("inbox-said"), done(answer));
    } catch (problem) {
      say($("inbox-said"), `${problem.detail} ${problem.fix}`);
    }
    await refreshInbox();
    const next = $("inbox").querySelector("button"); // else the focus would jump to the top of the page
    if (next) next.focus();
    else $("inbox-card").focus();
  };
  const line = make("p", "row");
  line.append(
    button("Play", () => play(entry, player)),
    label,
    button("Accept", () => act("accept", `?label=${encodeURIComponent(label.value)}`,
      (answer) => `Accepted as data/${answer.path}: ${answer.next}.`), ""),
    button("Reject", () => act("reject", "", () => `Rejected: ${entry.filename} was removed.`)),
  );
  item.append(facts, line, player);
  return item;
}

async function play(entry, place) {
  try {
    const clip = await (await ask(`v1/corrections/${entry.id}/video`)).blob();
    const element = make("video");
    Object.assign(element, { controls: true, muted: true, playsInline: true, src: URL.createObjectURL(clip) });
    element.setAttribute("aria-label", `The clip ${entry.filename}`);
    element.addEventListener("error", () => {
      place.replaceChildren(make("p", "quiet", "This browser can't play its format."));
    });
    place.replaceChildren(element);
    element.play().catch(() => {});
  } catch (problem) {
    place.replaceChildren(make("p", "quiet", problem.detail));
  }
}

document.addEventListener("corrected", refreshInbox);
