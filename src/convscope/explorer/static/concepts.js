"use strict";
// Concepts page: heatmaps of concepts over images. Each concept has one color scale for all images.
(() => {
  if (!page.heatmaps) return;
  const options = { colormap: page.colormap, signed: false, opacity: 0.45, max: 1 };
  // The map of a concept contains those of all evaluated images, one below the other.
  const mapOfImage = (map, index) => {
    const height = map.height / page.numImages, size = height * map.width;
    return { height, width: map.width, values: unpackMap(map).subarray(index * size, (index + 1) * size) };
  };
  findAll("canvas[data-concept]").forEach((canvas) =>
    paint(canvas, mapOfImage(page.heatmaps[canvas.dataset.concept], Number(canvas.dataset.image)), options));
  findAll("canvas[data-image-concept]").forEach((canvas) => {
    const concept = canvas.dataset.imageConcept, map = page.imageHeatmaps[concept];
    paint(canvas, map, { ...options, max: map.peak > 0 ? page.heatmaps[concept].peak / map.peak : 1 });
  });

  const select = document.getElementById("concept-form").elements.concept;
  function showConcept() {
    findAll("#evaluated canvas").forEach((canvas) => {
      canvas.hidden = select.value === "";
      if (!canvas.hidden) paint(canvas, mapOfImage(page.heatmaps[select.value], Number(canvas.dataset.image)), options);
    });
  }
  select.addEventListener("change", showConcept);
  showConcept();
})();
