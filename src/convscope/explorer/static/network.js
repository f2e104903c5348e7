"use strict";
// The network as a whole: a bar for each layer, coloured by what is asked for.
(() => {
  const graph = document.getElementById("graph"), read = document.getElementById("read"), select = document.getElementById("quantity");
  const MEASURED = ["dead", "sparsity", "busiest tenth", "selectivity"];
  const SAYS = {
    field: "How many pixels of the picture one place of the layer sees (largest side).",
    units: "How many detectors the layer has.", parameters: "How many numbers the layer has learned.",
    dead: "The share of units that say the same everywhere on the picture.",
    sparsity: "The share of values that are nought or less.",
    "busiest tenth": "The share of the layer's activation that its busiest tenth of units holds.",
    selectivity: "How much the layer's units prefer one class (0 to 1, mean over units).",
  };
  const value = (row, name) => (MEASURED.includes(name) ? row.measured[name] : row[name]);
  const high = Math.max(...page.layers.map((row) => row.shape[1] || 1));
  const most = Math.max(...page.layers.map((row) => row.units));
  const { step, pitch, top, column, lane } = page.graph;

  function shade(share) {
    const low = [232, 238, 244], top = [16, 78, 139];
    return `rgb(${low.map((v, i) => Math.round(v + share * (top[i] - v))).join(" ")})`;
  }

  // Where each bar lies: its middle, and half its width and height.
  const bars = page.layers.map((row, i) => ({
    x: 20 + (column[i] + 0.5) * step,
    y: top + (lane[i] + 0.5) * pitch,
    wide: Math.max(3, (Math.min(step, 24) - 3) * Math.log2(1 + row.units) / Math.log2(1 + most)) / 2,
    tall: Math.max(8, (pitch - 8) * Math.log2(1 + (row.shape[1] || 1)) / Math.log2(1 + high)) / 2,
  }));
  for (const [from, to] of page.graph.lines) {
    const a = bars[from], b = bars[to], end = b.x - b.wide;
    const turn = a.y === b.y ? end : Math.max(a.x + a.wide, b.x - step + a.wide), middle = (turn + end) / 2;
    graph.append(make("path", { d: `M${a.x + a.wide} ${a.y}H${turn}C${middle} ${a.y} ${middle} ${b.y} ${end} ${b.y}` }));
  }
  for (const [from, to] of page.graph.arcs) {
    const a = bars[from], b = bars[to], high = Math.min(a.y - a.tall, b.y - b.tall) - Math.min(48, 14 + 2 * (column[to] - column[from]));
    graph.append(make("path", { d: `M${a.x} ${a.y - a.tall}C${a.x} ${high} ${b.x} ${high} ${b.x} ${b.y - b.tall}` }));
  }
  page.layers.forEach((row, i) => {
    const { x, y, wide, tall } = bars[i];
    const link = document.createElementNS("http://www.w3.org/2000/svg", "a");
    link.setAttribute("href", row.page);
    link.append(make("rect", { x: x - wide, y: y - tall, width: 2 * wide, height: 2 * tall }));
    link.dataset.layer = i;
    graph.append(link);
  });
  for (const [at, side] of page.graph.marks) {
    graph.append(make("text", { x: 20 + at * step, y: page.graph.height - 6 }, String(side)));
  }

  const sources = page.layers.map(() => []);
  for (const [from, to] of [...page.graph.lines, ...page.graph.arcs]) sources[to].push(from);
  const joined = (names) => `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  function tell(i) {
    const row = page.layers[i], name = select.value, v = value(row, name);
    const shown = v === undefined || v === null ? "not measured" : MEASURED.includes(name) && name !== "selectivity" ? `${(100 * v).toFixed(0)} %` : short(v);
    const joins = sources[i].length > 1 ? `; joins ${joined(sources[i].sort((a, b) => a - b).map((k) => page.layers[k].name))}` : "";
    return `${row.name}: ${row.kind}, ${row.shape.join(" × ")}; ${select.selectedOptions[0].textContent} ${shown}${joins}`;
  }
  function colourAll() {
    const name = select.value, values = page.layers.map((row) => value(row, name));
    const numbers = values.filter((v) => v !== undefined && v !== null);
    const most = Math.max(...numbers, 1e-9), least = Math.min(...numbers, 0);
    const log = ["parameters", "units"].includes(name);
    const scaled = (v) => (log ? Math.log1p(v) / Math.log1p(most) : (v - least) / (most - least));
    findAll("a", graph).forEach((link) => {
      const i = Number(link.dataset.layer), v = values[i];
      find("rect", link).setAttribute("fill", v === undefined || v === null ? "transparent" : shade(scaled(v)));
      link.setAttribute("aria-label", tell(i));
    });
    const span = numbers.length ? ` Lightest ${short(Math.min(...numbers))}, darkest ${short(most)}.` : " Not measured.";
    document.getElementById("quantity-says").textContent = SAYS[name] + span;
  }
  for (const kind of ["mouseover", "focusin"]) graph.addEventListener(kind, (event) => {
    const link = event.target.closest("a");
    if (link) read.textContent = tell(Number(link.dataset.layer));
  });

  async function measured() {
    if (!page.live || !page.summaries || page.layers.every((row) => "sparsity" in row.measured)) return;
    const told = await ask(page.summaries);
    // What a data set told is not taken back by one picture.
    page.layers.forEach((row) => { row.measured = { ...told.layers[row.name], ...row.measured }; });
    for (const line of findAll("#layers tbody tr")) {
      const own = told.layers[line.dataset.layer] || {};
      for (const cell of findAll("[data-measure]", line)) {
        if (cell.dataset.measure in own && !cell.textContent) cell.textContent = `${(100 * own[cell.dataset.measure]).toFixed(0)} %`;
      }
    }
  }
  select.addEventListener("change", async () => {
    colourAll();
    const asked = new URLSearchParams({ quantity: select.value });
    if (page.live) history.replaceState(null, "", `?${asked}`);
  });
  document.getElementById("csv").addEventListener("click", () => {
    const cell = (text) => `"${String(text ?? "").replaceAll('"', '""')}"`;
    const columns = ["name", "kind", "units", "field", "stride", "parameters"];
    const rows = page.layers.map((row) => [...columns.map((c) => row[c]), ...MEASURED.map((m) => row.measured[m])].map(cell).join(","));
    const file = new Blob([[[...columns, ...MEASURED].map(cell).join(","), ...rows].join("\n") + "\n"], { type: "text/csv" });
    const link = make("a", { href: URL.createObjectURL(file), download: "layers.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const asked = new URLSearchParams(location.search).get("quantity");
  if (asked && [...select.options].some((o) => o.value === asked)) select.value = asked;
  colourAll();
  measured().then(colourAll).catch((error) => say(error.message));
})();
