"use strict";
// A unit's page: its pattern drawn while one looks on, and its map on the picture.
(() => {
  if (page.map) {
    const stage = find('[data-stage="unit"]');
    const again = () => paint(find("canvas", stage), page.map, { palette: page.palettes.viridis, signed: false, opacity: 0.72 });
    again();
    new ResizeObserver(again).observe(find(".frame", stage));
  }
  const form = document.getElementById("what");
  if (!form) return;
  const progress = document.getElementById("progress"), box = document.getElementById("pattern");
  let source = null;

  const address = () => {
    const asked = new URLSearchParams(location.search);
    for (const [name, value] of new FormData(form)) asked.set(name, value);
    return asked;
  };
  function stop(reason) {
    if (source) source.close();
    source = null;
    progress.hidden = true;
    if (reason) {
      say(reason);
      box.replaceChildren(make("div", { class: "blank" }, draw));
    }
  }
  const draw = document.getElementById("draw") || make("button", { type: "button", id: "draw" }, "Draw it now");
  function begin() {
    progress.hidden = false;
    document.getElementById("cancel").focus();
    const asked = address();
    asked.delete("picture");
    asked.set("layer", page.layer);
    asked.set("unit", page.unit);
    source = follow(`${page.events}?${asked}`, {
      onProgress: showProgress,
      onFrame: (data) => {
        const image = find("img", box);
        if (image) image.src = data;
        else box.replaceChildren(make("img", { src: data, alt: "The pattern so far", width: 160, height: 160 }));
      },
      onDone: () => location.replace(`?${address()}`),
      onError: (reason) => stop(reason),
    });
  }
  draw.addEventListener("click", begin);
  document.getElementById("cancel").addEventListener("click", () => stop("Cancelled."));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => { location.search = address(); });
})();
