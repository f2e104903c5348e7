"use strict";
// Network page: the graph of layers, colored by a measure, and the download of the table.
(() => {
  const svg = document.getElementById("graph"), details = document.getElementById("details"), select = document.getElementById("measure");
  const MEASURES = ["dead", "sparsity", "top_decile_share", "selectivity"];
  const DESCRIPTIONS = {
    field: "Receptive field in pixels (longest side).",
    units: "Number of units.",
    parameters: "Number of parameters.",
    dead: "Fraction of units that are constant on the image, or never active on the data set.",
    sparsity: "Fraction of activations that are not positive.",
    top_decile_share: "Fraction of the total positive activation in the most active 10 % of units.",
    selectivity: "Mean class selectivity of the units, from 0 to 1.",
  };
  const valueOf = (layer, name) => (MEASURES.includes(name) ? layer.measures[name] : layer[name]);
  const isMissing = (value) => value === undefined || value === null;
  const maxSide = Math.max(...page.layers.map((layer) => layer.shape[1] || 1));
  const maxUnits = Math.max(...page.layers.map((layer) => layer.units));
  const { column_width: columnWidth, lane_height: laneHeight, top, column, lane } = page.graph;

  function shade(fraction) {
    const light = [232, 238, 244], dark = [16, 78, 139];
    return `rgb(${light.map((v, i) => Math.round(v + fraction * (dark[i] - v))).join(" ")})`;
  }

  // Each bar: its centre and half its width and height.
  const bars = page.layers.map((layer, i) => ({
    x: 20 + (column[i] + 0.5) * columnWidth,
    y: top + (lane[i] + 0.5) * laneHeight,
    dx: Math.max(3, (Math.min(columnWidth, 24) - 3) * Math.log2(1 + layer.units) / Math.log2(1 + maxUnits)) / 2,
    dy: Math.max(8, (laneHeight - 8) * Math.log2(1 + (layer.shape[1] || 1)) / Math.log2(1 + maxSide)) / 2,
  }));
  for (const [start, end] of page.graph.straight) {
    const a = bars[start], b = bars[end], right = b.x - b.dx;
    const bend = a.y === b.y ? right : Math.max(a.x + a.dx, b.x - columnWidth + a.dx), middle = (bend + right) / 2;
    svg.append(createElement("path", { d: `M${a.x + a.dx} ${a.y}H${bend}C${middle} ${a.y} ${middle} ${b.y} ${right} ${b.y}` }));
  }
  for (const [start, end] of page.graph.arcs) {
    const a = bars[start], b = bars[end], peak = Math.min(a.y - a.dy, b.y - b.dy) - Math.min(48, 14 + 2 * (column[end] - column[start]));
    svg.append(createElement("path", { d: `M${a.x} ${a.y - a.dy}C${a.x} ${peak} ${b.x} ${peak} ${b.x} ${b.y - b.dy}` }));
  }
  page.layers.forEach((layer, i) => {
    const { x, y, dx, dy } = bars[i];
    const link = document.createElementNS("http://www.w3.org/2000/svg", "a");
    if (layer.page) link.setAttribute("href", layer.page);
    else link.setAttribute("role", "img");  // not published
    link.append(createElement("rect", { x: x - dx, y: y - dy, width: 2 * dx, height: 2 * dy }));
    link.dataset.layer = i;
    svg.append(link);
  });
  for (const [at, side] of page.graph.labels) {
    svg.append(createElement("text", { x: 20 + at * columnWidth, y: page.graph.height - 6 }, String(side)));
  }

  const inputs = page.layers.map(() => []);
  for (const [start, end] of [...page.graph.straight, ...page.graph.arcs]) inputs[end].push(start);
  const joinNames = (names) => `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  function describe(i) {
    const layer = page.layers[i], name = select.value, value = valueOf(layer, name);
    const isFraction = MEASURES.includes(name) && name !== "selectivity";
    const text = isMissing(value) ? "not measured" : isFraction ? `${(100 * value).toFixed(0)} %` : formatNumber(value);
    const joins = inputs[i].length > 1 ? `; joins ${joinNames(inputs[i].sort((a, b) => a - b).map((k) => page.layers[k].name))}` : "";
    return `${layer.name}: ${layer.kind}, output ${layer.shape.join(" × ")}; ${select.selectedOptions[0].textContent}: ${text}${joins}`;
  }
  function colorBars() {
    const name = select.value, values = page.layers.map((layer) => valueOf(layer, name));
    const measured = values.filter((value) => !isMissing(value));
    const max = Math.max(...measured, 1e-9), min = Math.min(...measured, 0);
    const useLog = ["parameters", "units"].includes(name);
    const scale = (value) => (useLog ? Math.log1p(value) / Math.log1p(max) : (value - min) / (max - min));
    findAll("a", svg).forEach((link) => {
      const i = Number(link.dataset.layer), value = values[i];
      find("rect", link).setAttribute("fill", isMissing(value) ? "transparent" : shade(scale(value)));
      link.setAttribute("aria-label", describe(i));
    });
    const range = measured.length ? ` Lightest: ${formatNumber(Math.min(...measured))}, darkest: ${formatNumber(max)}.` : " Not measured.";
    document.getElementById("measure-description").textContent = DESCRIPTIONS[name] + range;
  }
  for (const kind of ["mouseover", "focusin"]) svg.addEventListener(kind, (event) => {
    const link = event.target.closest("a");
    if (link) details.textContent = describe(Number(link.dataset.layer));
  });

  async function fetchMeasures() {
    if (!page.live || !page.summaries || page.layers.every((layer) => "sparsity" in layer.measures)) return;
    const { layers } = await fetchJson(page.summaries);
    // Measures of the data set take precedence over those of a single image.
    page.layers.forEach((layer) => { layer.measures = { ...layers[layer.name], ...layer.measures }; });
    for (const row of findAll("#layers tbody tr")) {
      const measures = layers[row.dataset.layer] || {};
      for (const cell of findAll("[data-measure]", row)) {
        if (cell.dataset.measure in measures && !cell.textContent) cell.textContent = `${(100 * measures[cell.dataset.measure]).toFixed(0)} %`;
      }
    }
  }
  select.addEventListener("change", () => {
    colorBars();
    if (page.live) history.replaceState(null, "", `?${new URLSearchParams({ measure: select.value })}`);
  });
  document.getElementById("csv").addEventListener("click", () => {
    const quote = (text) => `"${String(text ?? "").replaceAll('"', '""')}"`;
    const columns = ["name", "kind", "units", "field", "stride", "parameters"];
    const rows = page.layers.map((layer) => [...columns.map((c) => layer[c]), ...MEASURES.map((m) => layer.measures[m])]);
    const header = [...columns.map((c) => (c === "field" ? "receptive_field" : c)), ...MEASURES];
    const text = [header, ...rows].map((cells) => cells.map(quote).join(",")).join("\n");
    const file = new Blob([`${text}\n`], { type: "text/csv" });
    const link = createElement("a", { href: URL.createObjectURL(file), download: "layers.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const measure = new URLSearchParams(location.search).get("measure");
  if (measure && [...select.options].some((option) => option.value === measure)) select.value = measure;
  colorBars();
  fetchMeasures().then(colorBars).catch((error) => showStatus(error.message));
})();
