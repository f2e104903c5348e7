"use strict";
// The concepts of a class: their heat over pictures, each on its own scale, the same for all pictures.
(() => {
  if (!page.heats) return;
  const look = { palette: page.palette, signed: false, opacity: 0.45, peak: 1 };
  // All judged pictures lie below each other in a concept's map: this cuts out one.
  const cut = (map, picture) => {
    const height = map.height / page.pictures, count = height * map.width;
    return { height, width: map.width, values: unpack(map).subarray(picture * count, (picture + 1) * count) };
  };
  findAll("canvas[data-heat]").forEach((canvas) =>
    paint(canvas, cut(page.heats[canvas.dataset.heat], Number(canvas.dataset.picture)), look));
  findAll("canvas[data-current]").forEach((canvas) => {
    const map = page.current[canvas.dataset.current], most = page.heats[canvas.dataset.current].peak;
    paint(canvas, map, { ...look, peak: map.peak > 0 ? most / map.peak : 1 });
  });

  const choice = document.getElementById("choice").elements.concept;
  function show() {
    findAll("#judged canvas").forEach((canvas) => {
      canvas.hidden = choice.value === "";
      if (!canvas.hidden) paint(canvas, cut(page.heats[choice.value], Number(canvas.dataset.picture)), look);
    });
  }
  choice.addEventListener("change", show);
  show();
})();
