"use strict";
// Layer page: the sorted grid of activation maps, and the most active units at a position.
(() => {
  const grid = document.getElementById("grid");
  if (!grid) return;
  const mapsAtFirst = Number(grid.dataset.first), showAll = document.getElementById("show-all");
  const order = document.getElementById("order");
  const items = new Map(findAll("li", grid).map((item) => [Number(item.dataset.unit), item]));
  let allShown = false;

  function showItem(item) {
    const svg = find("svg", item);
    if (!svg.firstElementChild && showAll) svg.append(createElement("image", { href: showAll.dataset.sheet, width: showAll.dataset.width, height: showAll.dataset.height }));
    item.hidden = false;
  }
  function sortMaps() {
    const key = order.value;
    const units = [...items.keys()].sort((a, b) => a - b);
    if (key !== "unit") units.sort((a, b) => page.table[key][b] - page.table[key][a] || a - b);
    units.forEach((unit, i) => {
      const item = items.get(unit);
      if (i < mapsAtFirst || allShown) showItem(item);
      else item.hidden = true;
      find("a", item).title = key === "unit" ? `Unit ${unit}` : `Unit ${unit}: ${order.selectedOptions[0].textContent} ${formatNumber(page.table[key][unit])}`;
    });
    grid.replaceChildren(...units.map((unit) => items.get(unit)));
  }
  order.addEventListener("change", sortMaps);
  document.getElementById("contrast").addEventListener("change", (event) => grid.classList.toggle("contrast", event.target.checked));
  if (showAll) showAll.addEventListener("click", () => { allShown = true; sortMaps(); showAll.hidden = true; });
  const target = document.getElementById("target");
  if (target) target.addEventListener("change", async () => {
    try {
      const { relevance } = await fetchJson(`${page.api}/relevance?layer=${encodeURIComponent(page.layer)}&target=${target.value}`);
      page.table.relevance = relevance;
      order.value = "relevance";
      document.getElementById("relevance-class").textContent = target.selectedOptions[0].textContent;
      sortMaps();
    } catch (error) { showStatus(error.message); }
  });

  // Positions.
  const frame = document.getElementById("position"), list = document.getElementById("position-units");
  const [rows, columns] = page.grid;
  let position = [Math.floor(rows / 2), Math.floor(columns / 2)], request = null;

  function outline(element, box) {
    const [top, left, bottom, right] = box.map((v) => 100 * v);
    for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) element.setAttribute(name, value);
  }
  function receptiveField(row, column) {
    if (!page.field) return null;
    const start = [row, column].map((index, i) => page.field.origin[i] + index * page.field.stride[i]);
    return [...start.map((v) => Math.max(0, v)), ...start.map((v, i) => Math.min(1, v + page.field.size[i]))];
  }
  function showUnits({ row, column, units, receptive_field: field }) {
    const unitPage = (unit) => page.unitPage.replace(/0(\.html)?$/, `${unit}$1`) + (page.live ? `?image=${page.image}` : "");
    const entries = units.map((u) => createElement("li", {}, createElement("a", { href: unitPage(u.unit) }, `unit ${u.unit}`), ` ${formatNumber(u.value)}`));
    list.replaceChildren(
      createElement("p", {}, `Row ${row + 1} of ${rows}, column ${column + 1} of ${columns}. ${entries.length ? "Most active units:" : "No unit is active here."}`),
      createElement("ol", {}, ...entries),
      ...(field ? [] : [createElement("p", {}, "The receptive field is the whole image.")]));
    outline(document.getElementById("field"), field || [0, 0, 1, 1]);
  }
  async function selectPosition(row, column) {
    row = Math.max(0, Math.min(rows - 1, row));
    column = Math.max(0, Math.min(columns - 1, column));
    position = [row, column];
    outline(document.getElementById("cell"), [row / rows, column / columns, (row + 1) / rows, (column + 1) / columns]);
    if (!page.live) {
      if (!page.positions) { list.textContent = "Published pages do not list the units of layers with more than 1,024 positions."; return; }
      const i = row * columns + column;
      const units = page.positions.units[i].map((unit, k) => ({ unit, value: page.positions.values[i][k] })).filter((u) => u.value > 0);
      showUnits({ row, column, units, receptive_field: receptiveField(row, column) });
      return;
    }
    if (request) request.abort();
    request = new AbortController();
    try {
      showUnits(await fetchJson(`${page.api}/position?layer=${encodeURIComponent(page.layer)}&row=${row}&column=${column}`, { signal: request.signal }));
    } catch (error) { if (error.name !== "AbortError") showStatus(error.message); }
  }
  frame.addEventListener("click", (event) => {
    const box = frame.getBoundingClientRect();
    selectPosition(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  });
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    selectPosition(position[0] + step[0], position[1] + step[1]);
  });
})();
