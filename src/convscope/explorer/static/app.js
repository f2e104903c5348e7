"use strict";
// What all pages share: the page's data, help on words, copying, light and dark, moving by keys.
const page = JSON.parse(document.getElementById("data").textContent);
const find = (selector, within = document) => within.querySelector(selector);
const findAll = (selector, within = document) => [...within.querySelectorAll(selector)];

function say(text) {
  const box = document.getElementById("say");
  box.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { box.textContent = ""; }, 6000);
}

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "polyline", "image", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function ask(address, options = {}) {
  const answer = await fetch(address, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error || `the explorer answered ${answer.status}`);
  return content;
}

const short = (value, digits = 3) => Math.abs(value) >= 10 ** digits && Math.abs(value) < 1e6 ? String(Math.round(value)) : Number(value).toPrecision(digits).replace(/\.?0+$|(\.\d*?)0+(?=e|$)/, "$1");

// Words and their explanations.
function closeTip() {
  const tip = document.getElementById("tip");
  if (tip) tip.remove();
  findAll('.term[aria-expanded="true"]').forEach((term) => term.setAttribute("aria-expanded", "false"));
}
document.addEventListener("click", (event) => {
  const term = event.target.closest(".term");
  const open = term && term.getAttribute("aria-expanded") === "true";
  closeTip();
  if (!term || open) return;
  event.preventDefault();
  const tip = make("div", { id: "tip", role: "tooltip" }, term.dataset.term);
  document.body.append(tip);
  const where = term.getBoundingClientRect();
  tip.style.top = `${where.bottom + scrollY + 6}px`;
  tip.style.left = `${Math.max(8, Math.min(where.left, innerWidth - tip.offsetWidth - 8)) + scrollX}px`;
  term.setAttribute("aria-expanded", "true");
  term.setAttribute("aria-describedby", "tip");
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const code = find("code", button.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren(code);
    say("Selected: copy it with Ctrl+C.");
  }
});

// Light and dark.
const stored = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
if (stored) document.documentElement.dataset.theme = stored;
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* private windows keep nothing */ }
});

// Keys: [ and ] go to the neighbours.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeTip();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  const neighbour = { "[": 'a[rel="prev"]', "]": 'a[rel="next"]' }[event.key];
  const link = neighbour && find(neighbour);
  if (link) link.click();
});

// Progress by server-sent events: work that ends when this page no longer listens.
function follow(address, { onProgress, onFrame, onDone, onError }) {
  const source = new EventSource(address);
  // An event source is not told why it was refused; a plain question is. Should that be let in, it ends at once.
  async function refused() {
    const asking = new AbortController(), lost = "the connection was lost";
    try {
      const answer = await fetch(address, { signal: asking.signal });
      onError(answer.ok ? lost : (await answer.json()).error || lost);
    } catch { onError(lost); }
    asking.abort();
  }
  let heard = false;
  source.addEventListener("progress", (event) => { heard = true; onProgress(JSON.parse(event.data)); });
  source.addEventListener("frame", (event) => onFrame && onFrame(event.data));
  source.addEventListener("done", (event) => { source.close(); onDone(JSON.parse(event.data)); });
  source.addEventListener("failed", (event) => { source.close(); onError(JSON.parse(event.data).error); });
  source.onerror = () => {
    if (source.readyState === EventSource.OPEN) return;
    source.close();
    if (heard) onError("the connection was lost");
    else refused();
  };
  addEventListener("pagehide", () => source.close());
  return source;
}

function showProgress(told) {
  const bar = document.getElementById("bar"), stage = document.getElementById("stage");
  if (told.ahead > 0 || !told.begun) {
    bar.removeAttribute("value");
    stage.textContent = told.ahead > 0 ? `waiting: ${told.ahead} before this one` : "about to begin";
  } else if (told.total) {
    bar.value = told.done / told.total;
    stage.textContent = `${Math.floor(100 * told.done / told.total)} %`;
  }
}
