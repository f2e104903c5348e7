"use strict";
// Colour maps over images. They are drawn in the browser, so that opacity and colormap respond at once.
// A map has `height`, `width` and either `values`, or `data`: int16 in base64, relative to `peak`.
function unpackMap(map) {
  const bytes = Uint8Array.from(atob(map.data), (c) => c.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (v) => v / 32767);
}

function interpolateColor(colormap, fraction) {
  const position = Math.max(0, Math.min(1, fraction)) * (colormap.length - 1);
  const low = Math.floor(position), high = Math.min(colormap.length - 1, low + 1), weight = position - low;
  return [0, 1, 2].map((i) => colormap[low][i] + weight * (colormap[high][i] - colormap[low][i]));
}

// Bilinear interpolation between the centres of the cells, with replicated borders, as in the Python library.
function resize(values, height, width, outHeight, outWidth) {
  const out = new Float32Array(outHeight * outWidth);
  const samples = (count, length) => Array.from({ length: count }, (_, i) => {
    const position = Math.max(0, Math.min(length - 1, (i + 0.5) / count * length - 0.5));
    const low = Math.floor(position);
    return [low, Math.min(length - 1, low + 1), position - low];
  });
  const rows = samples(outHeight, height), columns = samples(outWidth, width);
  rows.forEach(([top, bottom, rowWeight], y) => columns.forEach(([left, right, columnWeight], x) => {
    const upper = values[top * width + left] * (1 - columnWeight) + values[top * width + right] * columnWeight;
    const lower = values[bottom * width + left] * (1 - columnWeight) + values[bottom * width + right] * columnWeight;
    out[y * outWidth + x] = upper * (1 - rowWeight) + lower * rowWeight;
  }));
  return out;
}

// Options: colormap (colours from low to high), signed, opacity (0 to 1), and max: the value of the last colour,
// by default the maximum of the map.
function paint(canvas, map, options) {
  const values = map.values || unpackMap(map);
  const ratio = canvas.clientWidth && canvas.clientHeight ? canvas.clientHeight / canvas.clientWidth : 1;
  const width = 256, height = Math.max(16, Math.min(512, Math.round(256 * ratio)));
  canvas.width = width;
  canvas.height = height;
  const resized = resize(values, map.height, map.width, height, width);
  let max = options.max || 0;
  if (!options.max) for (const v of resized) max = Math.max(max, options.signed ? Math.abs(v) : v);
  const image = new ImageData(width, height);
  for (let i = 0; i < resized.length; i++) {
    const fraction = max > 0 ? resized[i] / max : 0;
    const [r, g, b] = interpolateColor(options.colormap, options.signed ? (fraction + 1) / 2 : fraction);
    image.data.set([r, g, b, 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.style.opacity = options.opacity;
}
