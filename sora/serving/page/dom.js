// What all parts of the page use. Everything from outside (labels, file names, messages) enters the page as
// text, never as markup.

export const $ = (id) => document.getElementById(id);

export const percent = new Intl.NumberFormat("en", {
  style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1,
});

export function make(tag, className = "", text = undefined) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function button(text, action, className = "plain") {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

// A choice of names, one of them chosen.
export function choice(names, chosen, label) {
  const element = make("select");
  element.setAttribute("aria-label", label);
  for (const name of names) {
    const option = make("option", "", name);
    option.value = name;
    option.selected = name === chosen;
    element.append(option);
  }
  return element;
}

// A choice of several names, with the given ones chosen.
export function choices(names, chosen, label) {
  const element = choice(names, null, label);
  element.multiple = true;
  element.size = Math.min(8, names.length);
  for (const option of element.options) option.selected = chosen.includes(option.value);
  return element;
}

export function bytes(count) {
  return count >= 1e6 ? `${Math.round(count / 1e5) / 10} MB` : `${Math.max(1, Math.round(count / 1000))} kB`;
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text; // a live region: speak changes only
}

export function authorization() {
  const token = sessionStorage.getItem("sora-token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

export const UNREACHABLE = { status: 0, title: "No answer", detail: "The connection was lost.", fix: "Try again." };

// A request to this server. Returns the response; throws the problem document if the status is not 2xx.
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: authorization(), cache: "no-store" });
  } catch {
    throw UNREACHABLE;
  }
  if (response.ok) return response;
  if (response.status === 401) needToken();
  throw await response.json().catch(() => ({ ...UNREACHABLE, status: response.status }));
}

export function needToken() {
  document.dispatchEvent(new CustomEvent("token-needed"));
}

export function problemBox(problem) {
  const box = make("div", "problem");
  box.append(make("strong", "", problem.title), make("p", "", problem.detail), make("p", "quiet", problem.fix));
  return box;
}
