"use strict";
// Color maps over images. They are drawn in the browser, so that opacity and colormap respond at once.
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

// Smooth a map by a Gaussian of 1 % of its longer side, as the Python library does with maps at the input.
function smooth(values, height, width) {
  const sigma = Math.max(height, width) / 100, radius = Math.max(1, Math.round(3 * sigma));
  const kernel = Array.from({ length: 2 * radius + 1 }, (_, i) => Math.exp(-((i - radius) ** 2) / (2 * sigma ** 2)));
  const sum = kernel.reduce((a, b) => a + b);
  const along = (source, length, stride) => source.map((_, i) => {
    const position = Math.floor(i / stride) % length;
    let total = 0;
    for (let k = Math.max(-radius, -position); k <= Math.min(radius, length - 1 - position); k++) total += kernel[k + radius] * source[i + k * stride];
    return total / sum;
  });
  return along(along(values, height, width), width, 1);
}

// The value of the last color: the maximum, at the input a quantile.
function lastValue(values, signed, atInput) {
  const sorted = values.map((v) => (signed ? Math.abs(v) : Math.max(v, 0))).sort();
  const position = (atInput ? 0.995 : 1) * (sorted.length - 1), low = Math.floor(position);
  return sorted[low] + (position - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

// Options: colormap (colors from low to high), opacity (0 to 1); signed: whether negative values are shown, so that
// values are the more opaque the stronger they are; atInput: whether the map has the input's resolution; and max: the
// value of the last color, by default that of `lastValue`.
function paint(canvas, map, options) {
  let values = map.values || unpackMap(map);
  if (options.atInput) values = smooth(options.signed ? values : values.map((v) => Math.max(v, 0)), map.height, map.width);
  const ratio = canvas.clientWidth && canvas.clientHeight ? canvas.clientHeight / canvas.clientWidth : 1;
  const width = 256, height = Math.max(16, Math.min(512, Math.round(256 * ratio)));
  canvas.width = width;
  canvas.height = height;
  const resized = resize(values, map.height, map.width, height, width);
  const max = options.max || lastValue(resized, options.signed, options.atInput);
  const image = new ImageData(width, height);
  for (let i = 0; i < resized.length; i++) {
    const fraction = max > 0 ? Math.max(-1, Math.min(1, resized[i] / max)) : 0;
    const [r, g, b] = interpolateColor(options.colormap, options.signed ? (fraction + 1) / 2 : fraction);
    image.data.set([r, g, b, options.signed ? 255 * Math.abs(fraction) : 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.style.opacity = options.opacity;
}
