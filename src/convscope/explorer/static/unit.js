"use strict";
// Unit page: the activation map on the image, and the pattern, with previews while it is generated.
(() => {
  if (page.map) {
    const stage = find('[data-stage="unit"]');
    const repaint = () => paint(find("canvas", stage), page.map, { colormap: page.colormap, signed: false, opacity: 0.72 });
    repaint();
    new ResizeObserver(repaint).observe(find(".frame", stage));
  }
  const removal = document.getElementById("removal");
  async function showRemoval() {
    try {
      const { changes } = await fetchJson(`${page.changes}?${new URLSearchParams({ layer: page.layer, unit: page.unit })}`);
      const rows = changes.map((row) => createElement("tr", {},
        createElement("th", { scope: "row" }, row.name),
        createElement("td", { class: "number" }, `${row.before.toFixed(2)} → ${row.after.toFixed(2)}`),
        createElement("td", { class: "number" }, `${row.change > 0 ? "+" : ""}${row.change.toFixed(2)}`)));
      removal.replaceChildren(changes.some((row) => row.change !== 0)
        ? createElement("table", { class: "facts" }, ...rows) : "Nothing changes on this image.");
    } catch (error) { removal.textContent = error.message; }
  }
  if (removal) showRemoval();
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
