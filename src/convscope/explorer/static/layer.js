"use strict";
// A layer's page: its maps in order, and who speaks at a place.
(() => {
  const grid = document.getElementById("grid");
  if (!grid) return;
  const first = Number(grid.dataset.first), more = document.getElementById("more");
  const cells = new Map(findAll("li", grid).map((li) => [Number(li.dataset.unit), li]));
  let all = false;

  function fill(li) {
    const svg = find("svg", li);
    if (!svg.firstElementChild && more) svg.append(make("image", { href: more.dataset.sheet, width: more.dataset.width, height: more.dataset.height }));
    li.hidden = false;
  }
  function sort() {
    const by = document.getElementById("order").value;
    const units = [...cells.keys()].sort((a, b) => a - b);
    if (by !== "unit") units.sort((a, b) => page.table[by][b] - page.table[by][a] || a - b);
    units.forEach((unit, i) => {
      const li = cells.get(unit);
      if (i < first || all) fill(li);
      else li.hidden = true;
      const told = by === "unit" ? `unit ${unit}` : `unit ${unit}: ${by} ${short(page.table[by][unit])}`;
      find("a", li).title = told;
    });
    grid.replaceChildren(...units.map((unit) => cells.get(unit)));
  }
  document.getElementById("order").addEventListener("change", sort);
  document.getElementById("boost").addEventListener("change", (event) => grid.classList.toggle("boost", event.target.checked));
  if (more) more.addEventListener("click", () => { all = true; sort(); more.hidden = true; });
  const target = document.getElementById("target");
  if (target) target.addEventListener("change", async () => {
    try {
      const told = await ask(`${page.api}/relevance?layer=${encodeURIComponent(page.layer)}&target=${target.value}`);
      page.table.relevance = told.relevance;
      document.getElementById("order").value = "relevance";
      document.getElementById("relevant").textContent = target.selectedOptions[0].textContent;
      sort();
    } catch (error) { say(error.message); }
  });

  // Places.
  const place = document.getElementById("place"), there = document.getElementById("there");
  const [rows, columns] = page.grid;
  let at = [Math.floor(rows / 2), Math.floor(columns / 2)], asking = null;

  function mark(box, element) {
    const [top, left, bottom, right] = box.map((v) => 100 * v);
    for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) element.setAttribute(name, value);
  }
  function field(row, column) {
    if (!page.field) return null;
    const from = [row, column].map((at, i) => page.field.origin[i] + at * page.field.stride[i]);
    return [...from.map((v) => Math.max(0, v)), ...from.map((v, i) => Math.min(1, v + page.field.size[i]))];
  }
  function list(told) {
    const unitPage = (unit) => page.unitPage.replace(/0(\.html)?$/, `${unit}$1`) + (page.live ? `?picture=${page.picture}` : "");
    const items = told.units.map((u) => make("li", {}, make("a", { href: unitPage(u.unit) }, `unit ${u.unit}`), ` ${short(u.value)}`));
    there.replaceChildren(
      make("p", {}, `Place ${told.row + 1}, ${told.column + 1} of ${rows} × ${columns}. ${items.length ? "Strongest here:" : "No unit answers here."}`),
      make("ol", {}, ...items),
      ...(told.sees ? [] : [make("p", {}, "Each place sees the whole picture.")]));
    const whole = told.sees || [0, 0, 1, 1];
    mark(whole, document.getElementById("field"));
  }
  async function visit(row, column) {
    at = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    mark([at[0] / rows, at[1] / columns, (at[0] + 1) / rows, (at[1] + 1) / columns], document.getElementById("cell"));
    if (!page.live) {
      if (!page.places) { there.textContent = "Too many places to keep them all in a published page."; return; }
      const i = at[0] * columns + at[1];
      const units = page.places.units[i].map((unit, k) => ({ unit, value: page.places.values[i][k] })).filter((u) => u.value > 0);
      list({ row: at[0], column: at[1], units, sees: field(...at) });
      return;
    }
    if (asking) asking.abort();
    asking = new AbortController();
    try {
      list(await ask(`${page.api}/place?layer=${encodeURIComponent(page.layer)}&row=${at[0]}&column=${at[1]}`, { signal: asking.signal }));
    } catch (error) { if (error.name !== "AbortError") say(error.message); }
  }
  place.addEventListener("click", (event) => {
    const box = place.getBoundingClientRect();
    visit(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  });
  place.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    visit(at[0] + step[0], at[1] + step[1]);
  });
})();
