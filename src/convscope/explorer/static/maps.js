"use strict";
// Maps over pictures: from the network's numbers to colours, drawn here so that opacity and colours answer at once.
function unpack(map) {
  const bytes = Uint8Array.from(atob(map.data), (c) => c.charCodeAt(0));
  const whole = new Int16Array(bytes.buffer);
  return Float32Array.from(whole, (v) => v / 32767);
}

function colour(palette, share) {
  const at = Math.max(0, Math.min(1, share)) * (palette.length - 1);
  const low = Math.floor(at), high = Math.min(palette.length - 1, low + 1), part = at - low;
  return [0, 1, 2].map((i) => palette[low][i] + part * (palette[high][i] - palette[low][i]));
}

// Linear between the places' middles, the border repeated: as the library lays maps back over pictures.
function enlarge(values, height, width, outHeight, outWidth) {
  const out = new Float32Array(outHeight * outWidth);
  const axis = (count, length) => Array.from({ length: count }, (_, i) => {
    const at = Math.max(0, Math.min(length - 1, (i + 0.5) / count * length - 0.5));
    const low = Math.floor(at);
    return [low, Math.min(length - 1, low + 1), at - low];
  });
  const rows = axis(outHeight, height), columns = axis(outWidth, width);
  rows.forEach(([top, bottom, down], y) => columns.forEach(([left, right, across], x) => {
    const upper = values[top * width + left] * (1 - across) + values[top * width + right] * across;
    const lower = values[bottom * width + left] * (1 - across) + values[bottom * width + right] * across;
    out[y * outWidth + x] = upper * (1 - down) + lower * down;
  }));
  return out;
}

// look: palette (colours from low to high), signed, opacity 0..1; peak: the value of the last colour, else the highest.
function paint(canvas, map, look) {
  const values = map.values || unpack(map);
  const ratio = canvas.clientWidth && canvas.clientHeight ? canvas.clientHeight / canvas.clientWidth : 1;
  const width = 256, height = Math.max(16, Math.min(512, Math.round(256 * ratio)));
  canvas.width = width;
  canvas.height = height;
  const large = enlarge(values, map.height, map.width, height, width);
  let peak = look.peak || 0;
  if (!look.peak) for (const v of large) peak = Math.max(peak, look.signed ? Math.abs(v) : v);
  const image = new ImageData(width, height);
  for (let i = 0; i < large.length; i++) {
    const share = peak > 0 ? large[i] / peak : 0;
    const [r, g, b] = colour(look.palette, look.signed ? (share + 1) / 2 : share);
    image.data.set([r, g, b, 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.style.opacity = look.opacity;
}
