"use strict";
// Shared by all pages: page data, DOM helpers, definitions, copy buttons, theme, keyboard navigation and progress.
const page = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function showStatus(text) {
  const box = document.getElementById("status");
  box.textContent = text;
  clearTimeout(showStatus.timer);
  showStatus.timer = setTimeout(() => { box.textContent = ""; }, 6000);
}

const SVG_TAGS = ["svg", "rect", "path", "polyline", "image", "text"];
function createElement(tag, attributes = {}, ...children) {
  const isSvg = SVG_TAGS.includes(tag);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function createMeter(fraction) {
  return createElement("svg", { class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
    createElement("rect", { class: "track", width: 100, height: 6 }), createElement("rect", { class: "fill", width: 100 * fraction, height: 6 }));
}

async function fetchJson(url, options = {}) {
  const response = await fetch(url, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error || `The server responded with status ${response.status}.`);
  return content;
}

const uploadImage = (file) => fetchJson(`/api/images?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });

const formatNumber = (value, digits = 3) => Math.abs(value) >= 10 ** digits && Math.abs(value) < 1e6 ? String(Math.round(value)) : Number(value).toPrecision(digits).replace(/\.?0+$|(\.\d*?)0+(?=e|$)/, "$1");

// Definitions of terms.
function closeTooltip() {
  const tooltip = document.getElementById("tooltip");
  if (tooltip) tooltip.remove();
  findAll('.term[aria-expanded="true"]').forEach((term) => term.setAttribute("aria-expanded", "false"));
}
document.addEventListener("click", (event) => {
  const term = event.target.closest(".term");
  const isOpen = term && term.getAttribute("aria-expanded") === "true";
  closeTooltip();
  if (!term || isOpen) return;
  event.preventDefault();
  const tooltip = createElement("div", { id: "tooltip", role: "tooltip" }, term.dataset.definition);
  document.body.append(tooltip);
  const box = term.getBoundingClientRect();
  tooltip.style.top = `${box.bottom + scrollY + 6}px`;
  tooltip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tooltip.offsetWidth - 8)) + scrollX}px`;
  term.setAttribute("aria-expanded", "true");
  term.setAttribute("aria-describedby", "tooltip");
});

// Copy buttons.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const code = find("code", button.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
    showStatus("Copied.");
  } catch {
    getSelection().selectAllChildren(code);
    showStatus("Selected. Press Ctrl+C to copy.");
  }
});

// Light and dark theme.
const storedTheme = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
if (storedTheme) document.documentElement.dataset.theme = storedTheme;
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* unavailable in private windows */ }
});

// The keys [ and ] open the previous and the next layer or unit.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeTooltip();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  const selector = { "[": 'a[rel="prev"]', "]": 'a[rel="next"]' }[event.key];
  const link = selector && find(selector);
  if (link) link.click();
});

// Follow a job by server-sent events. The server cancels the job when the page stops listening.
function followJob(url, { onProgress, onFrame, onDone, onError }) {
  const source = new EventSource(url);
  // An EventSource does not expose why the server refused it, but an ordinary request does.
  async function reportRefusal() {
    const controller = new AbortController(), lost = "The connection was lost.";
    try {
      const response = await fetch(url, { signal: controller.signal });
      onError(response.ok ? lost : (await response.json()).error || lost);
    } catch { onError(lost); }
    controller.abort();
  }
  let accepted = false;
  source.addEventListener("progress", (event) => { accepted = true; onProgress(JSON.parse(event.data)); });
  source.addEventListener("frame", (event) => onFrame && onFrame(event.data));
  source.addEventListener("done", (event) => { source.close(); onDone(JSON.parse(event.data)); });
  source.addEventListener("failed", (event) => { source.close(); onError(JSON.parse(event.data).error); });
  source.onerror = () => {
    if (source.readyState === EventSource.OPEN) return;
    source.close();
    if (accepted) onError("The connection was lost.");
    else reportRefusal();
  };
  addEventListener("pagehide", () => source.close());
  return source;
}

function showProgress(progress) {
  const bar = document.getElementById("bar"), stage = document.getElementById("stage");
  if (progress.position > 0 || !progress.started) {
    bar.removeAttribute("value");
    stage.textContent = progress.position > 0 ? `Waiting for ${progress.position} other job${progress.position === 1 ? "" : "s"}` : "Starting";
  } else if (progress.total) {
    bar.value = progress.done / progress.total;
    stage.textContent = `${Math.floor(100 * progress.done / progress.total)} %`;
  }
}
