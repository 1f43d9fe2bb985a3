// The heat map: a small grid of numbers, drawn smoothly in the colours of matplotlib's "inferno" (CC0), whose brightness
// rises evenly, so it reads the same with every kind of colour vision and in grey.

const STOPS = ["#000004", "#210c4a", "#57106e", "#8a226a", "#bc3754", "#e45a31", "#f98e09", "#f9cb35", "#fcffa4"];
const WEAKEST_ALPHA = 0.3; // weak places stay visible through the map

const SCALE = Array.from({ length: 256 }, (_, i) => {
  const position = (i / 255) * (STOPS.length - 1);
  const left = Math.min(Math.floor(position), STOPS.length - 2);
  const channel = (stop, at) => Number.parseInt(STOPS[stop].slice(at, at + 2), 16);
  return [1, 3, 5].map((at) => channel(left, at) + (channel(left + 1, at) - channel(left, at)) * (position - left));
});

// For each of `count` pixels the four grid points of `size` around it and their weights in a uniform cubic B-spline: no
// corner and no overshoot, unlike the linear and cubic ways of a canvas.
function splineTaps(size, count) {
  return Array.from({ length: count }, (_, pixel) => {
    const position = ((pixel + 0.5) / count) * size - 0.5;
    const t = position - Math.floor(position);
    const weights = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3];
    return weights.map((weight, i) => [Math.min(Math.max(Math.floor(position) - 1 + i, 0), size - 1), weight / 6]);
  });
}

function enlarge(rows, width, height) {
  const across = splineTaps(rows[0].length, width);
  const wide = rows.map((row) => across.map((taps) => taps.reduce((sum, [i, weight]) => sum + row[i] * weight, 0)));
  return splineTaps(rows.length, height).map((taps) =>
    across.map((_, x) => taps.reduce((sum, [i, weight]) => sum + wide[i][x] * weight, 0)),
  );
}

/** Fills a canvas with `rows` of numbers from 0 (weakest) to 1; the spline's loss of contrast is made good. */
export function drawHeatMap(canvas, rows) {
  const values = enlarge(rows, canvas.width, canvas.height);
  const flat = values.flat();
  const low = flat.reduce((a, b) => Math.min(a, b));
  const range = flat.reduce((a, b) => Math.max(a, b)) - low;
  const image = new ImageData(canvas.width, canvas.height);
  flat.forEach((value, i) => {
    const strength = range > 0 ? (value - low) / range : 0;
    const alpha = WEAKEST_ALPHA + (1 - WEAKEST_ALPHA) * strength;
    image.data.set([...SCALE[Math.round(strength * 255)], 255 * alpha], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Fills a canvas of 256 by 1 with the scale, weak to strong from left to right. */
export function drawLegend(canvas) {
  const image = new ImageData(SCALE.length, 1);
  SCALE.forEach((colour, i) => image.data.set([...colour, 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
