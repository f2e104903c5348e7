"use strict";
// Page of a layer's units: a table that is sorted by effect, name, score or statistics, and searched by name.
(() => {
  const STEP = 60;  // rows that are added at a time
  const controls = document.getElementById("controls"), count = document.getElementById("count");
  const body = find("#units tbody"), more = document.getElementById("more");
  const { order, target, q } = controls.elements;
  const columns = page.columns, effects = page.effects || {};
  const units = Array.from({ length: page.units }, (_, unit) => unit);
  let limit = STEP;

  const pageOf = (unit) => page.unitPage.replace(/0(\.html)?$/, `${unit}$1`) + (page.live && page.image ? `?image=${encodeURIComponent(page.image)}` : "");
  const values = (key) => (key === "effect" ? effects[target.value] : columns[key]);
  const missing = (value) => value === null || value === undefined || value === "";
  function compare(key, a, b) {
    if (key === "unit" || !values(key)) return a - b;
    const [first, second] = [values(key)[a], values(key)[b]];
    if (missing(first) || missing(second)) return missing(first) - missing(second) || a - b;
    return (key === "name" ? first.localeCompare(second) : second - first) || a - b;
  }
  function tile(unit) {
    const { src, size, width, height } = page.tiles;
    const svg = createElement("svg", { class: "tile", viewBox: `0 0 ${size} ${size}`, "aria-hidden": "true" }, createElement("image", { href: src[unit], width, height }));
    return createElement("td", { class: "patch" }, svg);
  }
  const cell = (text) => createElement("td", { class: "number" }, text);
  function row(unit) {
    const name = columns.name ? columns.name[unit] : "", effect = target && effects[target.value];
    return createElement("tr", {},
      ...(page.tiles ? [tile(unit)] : []),
      createElement("th", { scope: "row" }, createElement("a", { href: pageOf(unit) }, name ? `${unit} ${name}` : String(unit))),
      ...(target ? [cell(effect ? `${effect[unit] > 0 ? "+" : ""}${effect[unit].toFixed(3)}` : "…")] : []),
      ...(columns.name ? [cell(missing(columns.score[unit]) ? "" : columns.score[unit].toFixed(2))] : []),
      ...(columns.maximum ? [cell(formatNumber(columns.maximum[unit]))] : []),
      ...(columns.selectivity ? [cell(missing(columns.selectivity[unit]) ? "" : columns.selectivity[unit].toFixed(2))] : []));
  }
  function show() {
    const words = q ? q.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    const matching = units.filter((unit) => words.every((word) => columns.name[unit].toLowerCase().includes(word)));
    matching.sort((a, b) => compare(order.value, a, b));
    body.replaceChildren(...matching.slice(0, limit).map(row));
    more.hidden = matching.length <= limit;
    count.textContent = words.length ? `${matching.length} of ${units.length}` : "";
  }
  let request = null;
  async function load() {
    show();
    if (!target || effects[target.value]) return;
    if (request) request.abort();
    request = new AbortController();
    const chosen = target.value;
    count.textContent = "Computing effects…";
    try {
      const query = new URLSearchParams({ layer: page.layer, target: chosen });
      effects[chosen] = (await fetchJson(`${page.api}/effects?${query}`, { signal: request.signal })).effects;
      show();
    } catch (error) { if (error.name !== "AbortError") count.textContent = error.message; }
  }
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", () => { limit = STEP; load(); });
  more.addEventListener("click", () => { limit += STEP; show(); });
  load();
})();
