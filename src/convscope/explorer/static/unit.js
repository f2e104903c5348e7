"use strict";
// Unit page: the activation map on the image, and the pattern, with previews while it is generated.
(() => {
  if (page.map) {
    const stage = find('[data-stage="unit"]');
    const repaint = () => paint(find("canvas", stage), page.map, { colormap: page.colormap, signed: false, opacity: 0.72 });
    repaint();
    new ResizeObserver(repaint).observe(find(".frame", stage));
  }
  // Removal of the unit: the classes that it speaks for fall, those that it speaks against rise.
  const removal = document.getElementById("removal"), removalForm = document.getElementById("removal-form");
  const changeRow = (row) => createElement("tr", {},
    createElement("th", { scope: "row" }, row.name),
    createElement("td", { class: "number" }, `${row.before.toFixed(2)} → ${row.after.toFixed(2)}`),
    createElement("td", { class: "number" }, `${row.change > 0 ? "+" : ""}${row.change.toFixed(2)}`));
  function changeTable(title, rows) {
    if (!rows.length) return [];
    return [createElement("h3", {}, title), createElement("table", { class: "facts" }, ...rows.map(changeRow))];
  }
  let removalRequest = null;
  async function showRemoval() {
    const how = removalForm.elements.how.value;
    if (removalRequest) removalRequest.abort();
    removalRequest = new AbortController();
    try {
      const query = new URLSearchParams({ layer: page.layer, unit: page.unit, how });
      const changes = page.live ? (await fetchJson(`${page.changesApi}?${query}`, { signal: removalRequest.signal })).changes : page.changes[how];
      removal.replaceChildren(
        ...changeTable("Lower without it: the unit speaks for them", changes.filter((row) => row.change < 0)),
        ...changeTable("Higher without it: it speaks against them", changes.filter((row) => row.change > 0)));
      if (!changes.length) removal.textContent = "Nothing changes on this image.";
    } catch (error) { if (error.name !== "AbortError") removal.textContent = error.message; }
  }
  if (removal) {
    removalForm.addEventListener("submit", (event) => event.preventDefault());
    removalForm.addEventListener("change", showRemoval);
    showRemoval();
  }
  const form = document.getElementById("pattern-form");
  if (!form) return;
  const progress = document.getElementById("progress"), box = document.getElementById("pattern");
  const generate = document.getElementById("generate") || createElement("button", { type: "button", id: "generate" }, "Generate the pattern");
  let source = null;

  const pageQuery = () => {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of new FormData(form)) query.set(name, value);
    return query;
  };
  function stop(reason) {
    if (source) source.close();
    source = null;
    progress.hidden = true;
    showStatus(reason);
    box.replaceChildren(createElement("div", { class: "blank" }, generate));
  }
  function start() {
    progress.hidden = false;
    document.getElementById("cancel").focus();
    const query = pageQuery();
    query.delete("image");
    query.set("layer", page.layer);
    query.set("unit", page.unit);
    source = followJob(`${page.events}?${query}`, {
      onProgress: showProgress,
      onFrame: (data) => {
        const image = find("img", box);
        if (image) image.src = data;
        else box.replaceChildren(createElement("img", { src: data, alt: "Preview of the pattern", width: 160, height: 160 }));
      },
      onDone: () => location.replace(`?${pageQuery()}`),
      onError: stop,
    });
  }
  generate.addEventListener("click", start);
  document.getElementById("cancel").addEventListener("click", () => stop("Cancelled."));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => { location.search = pageQuery(); });
})();
