// Colour maps, and the table that turns each of the 65,536 steps of a tile's values into a colour.

// 17 colours from low to high, sampled from matplotlib's maps of the same names (CC0).
const SAMPLED = {
  inferno:
    "0000030a0723200c4a3c0965570f6d70196e892269a32b61bb3754d14643e45a31f1721df98e08fbac10f8cb34f1e968fcfea4",
  viridis:
    "44015447186a472c7b4240853a528b32628d2c728e26818e20908c1e9f8828ae7f3ebc735ec96183d34baddc30d7e219fde724",
  magma:
    "0000030a07221c1046350f6a50127b691c808225819c2e7fb63679d0416fe65162f56a5bfb8861fea671fec488fde1a3fbfcbf",
  cividis:
    "00224d002d691a386f31436c434e6b52596c61646f6e70737c7b788b87789b9376aba072bbad6cccbb63dec957efd846fde737",
  turbo:
    "30123b4040a1466be34193fe28bbeb17dcc232f1976dfd62a4fc3bcdeb34edcf39fdab33fa7d20ea500dd02f04a915017a0402",
  coolwarm:
    "3a4cc04d67d76182ea779af68daffda3c1feb8cff8ccd8eddddcdbecd2c4f4c3abf7b092f39879ea7d61dc5e4bc93b37b30326",
};
// One hue each, after Okabe and Ito: for several channels over each other, told apart also by the colour-blind.
const SINGLE = { orange: "d55e00", blue: "0072b2", green: "009e73", pink: "cc79a7", black: "1a1a1a" };
// Of classes, after Okabe and Ito; further ones begin again.
const CLASSES = ["0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "56b4e9", "f0e442", "1a1a1a"];
const SIGNED = new Set(["coolwarm"]);
const EXPLAINED = 2; // bit of the coverage
const FADE = 4; // colour gathers strength over the first quarter of the window, as in overview.png
const STEPS = 65535;
const SHADES = 1023;

export const MAPS = [...Object.keys(SAMPLED), ...Object.keys(SINGLE)];
export const classColour = (number) => `#${CLASSES[number % CLASSES.length]}`;
export const isSigned = (map) => SIGNED.has(map);

/** Colours of a map as [red, green, blue], from low to high. */
export function colours(map) {
  const text = map === "classes" ? CLASSES.join("") : SAMPLED[map] || SINGLE[map].repeat(2);
  const found = [];
  for (let at = 0; at < text.length; at += 6) {
    found.push([0, 2, 4].map((part) => parseInt(text.slice(at + part, at + part + 2), 16)));
  }
  return found;
}

/** The colour at `share`, 0 to 1, of a map. */
export function colourAt(list, share) {
  const place = Math.min(1, Math.max(0, share)) * (list.length - 1);
  const low = Math.min(list.length - 2, Math.floor(place));
  const part = place - low;
  return list[low].map((value, i) => Math.round(value + (list[low + 1][i] - value) * part));
}

/**
 * What a value is shown as, [red, green, blue, alpha], by a layer's settings:
 * map, window [low, high], threshold (below it nothing is shown; null for none), fade.
 */
export function shade(settings, list, value) {
  const [low, high] = settings.window;
  const share = bent(settings, (value - low) / (high - low || 1));
  const strength = isSigned(settings.map) ? Math.abs(2 * share - 1) : share;
  const tested = isSigned(settings.map) ? Math.abs(value) : value;
  if (settings.threshold !== null && tested < settings.threshold) return [0, 0, 0, 0];
  const single = settings.map in SINGLE;
  const alpha = single ? Math.min(1, Math.max(0, share)) : settings.fade ? Math.min(1, Math.max(0, strength * FADE)) : 1;
  return [...colourAt(list, share), Math.round(255 * alpha)];
}

/** A share of the window after gamma: below 1 shows more of what is low; to both sides of the middle of signed maps. */
function bent({ gamma = 1, map }, share) {
  if (gamma === 1) return share;
  const inside = Math.min(1, Math.max(0, share));
  if (!isSigned(map)) return inside ** gamma;
  const side = 2 * inside - 1;
  return (1 + Math.sign(side) * Math.abs(side) ** gamma) / 2;
}

/** The steps of a tile at which a layer's lines run: none, its threshold, or four between the ends of its window. */
export function lineSteps({ lines = "", map, threshold, window: [low, high] }, scale) {
  if (!lines || map === "classes") return [];
  const values = lines.startsWith("contour")
    ? [threshold === null ? (low + high) / 2 : threshold]
    : [0.2, 0.4, 0.6, 0.8].map((share) => low + share * (high - low));
  return values.map((value) => ((value - scale[0]) / (scale[1] - scale[0])) * STEPS);
}

/** Draw lines of equal values over the pixels of a tile, dark on the low side and light on the high one; in place. */
export function drawLines(pixels, steps, out, width) {
  const band = (at) => {
    if (!(pixels[4 * at + 2] & EXPLAINED)) return -1;
    const step = (pixels[4 * at] << 8) | pixels[4 * at + 1];
    return steps.reduce((count, limit) => count + (step >= limit), 0);
  };
  const count = pixels.length / 4;
  const bands = Int8Array.from({ length: count }, (_, at) => band(at));
  const [dark, light] = new Uint32Array(new Uint8Array([16, 16, 16, 255, 255, 255, 255, 255]).buffer);
  for (let at = 0; at < count; at += 1) {
    for (const next of [(at + 1) % width ? at + 1 : at, at + width < count ? at + width : at]) {
      if (bands[at] === bands[next] || bands[at] < 0 || bands[next] < 0) continue;
      out[bands[at] < bands[next] ? at : next] = dark;
      out[bands[at] < bands[next] ? next : at] = light;
    }
  }
}

/** Colours in hexadecimal digits as [red, green, blue]. */
const parts = (list) => list.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

/** A colour for each step of a tile of a channel, whose values run from scale[0] to scale[1], as canvas pixels. */
export function table(settings, { scale, colours: own }) {
  if (settings.map === "classes") return classTable(settings, scale, own ? parts(own) : colours("classes"));
  const { window: [low, high], threshold, map } = settings;
  const shades = palette(settings);
  const made = new Uint32Array(STEPS + 1);
  const width = (scale[1] - scale[0]) / STEPS;
  const perValue = SHADES / (high - low || 1);
  const least = threshold === null ? -Infinity : threshold;
  const signed = isSigned(map);
  for (let step = 0; step <= STEPS; step += 1) {
    const value = scale[0] + step * width;
    if ((signed ? Math.abs(value) : value) < least) continue; // stays transparent
    made[step] = shades[Math.min(SHADES, Math.max(0, Math.round((value - low) * perValue)))];
  }
  return made;
}

/** The same for classes: steps are the number of a class plus its probability, below which a threshold hides it. */
function classTable({ window: [, count], threshold, fade, hidden = [] }, scale, list) {
  const made = new Uint32Array(STEPS + 1);
  const bytes = new Uint8ClampedArray(made.buffer);
  for (let step = 0; step <= STEPS; step += 1) {
    const value = scale[0] + (step * (scale[1] - scale[0])) / STEPS;
    const number = Math.floor(value);
    const share = value - number;
    if (number < 0 || number >= count || share < (threshold ?? 0) || hidden.includes(number)) continue;
    bytes.set([...list[number % list.length], fade ? 255 * share : 255], 4 * step);
  }
  return made;
}

/** The colours of a layer from its window's low to its high end, as canvas pixels. */
function palette(settings) {
  const [low, high] = settings.window;
  const list = colours(settings.map);
  const made = new Uint8ClampedArray((SHADES + 1) * 4);
  for (let i = 0; i <= SHADES; i += 1) {
    made.set(shade({ ...settings, threshold: null }, list, low + ((high - low) * i) / SHADES), i * 4);
  }
  return new Uint32Array(made.buffer);
}

/** Turn the pixels of a tile, values in red and green and coverage in blue, into colours; in place. */
export function recolour(pixels, lookup) {
  const out = new Uint32Array(pixels.buffer, pixels.byteOffset, pixels.length / 4);
  for (let i = 0, at = 0; i < out.length; i += 1, at += 4) {
    out[i] = pixels[at + 2] & EXPLAINED ? lookup[(pixels[at] << 8) | pixels[at + 1]] : 0;
  }
}

/** Places from 0 to 1 and the colours there, from the window's low to its high end. */
export function gradientStops(settings, list) {
  const [low, high] = settings.window;
  if (settings.map === "classes") {
    return Array.from({ length: 2 * high }, (_, i) => [Math.ceil(i / 2) / high, classColour(i >> 1)]);
  }
  return Array.from({ length: 33 }, (_, i) => {
    const [red, green, blue, alpha] = shade(settings, list, low + ((high - low) * i) / 32);
    return [i / 32, `rgba(${red},${green},${blue},${((alpha / 255) * settings.opacity).toFixed(3)})`];
  });
}

/** A CSS gradient of a layer's colours over a pale tissue, from the window's low to its high end. */
export function gradient(settings) {
  const stops = gradientStops(settings, colours(settings.map)).map(([, colour]) => colour);
  return `linear-gradient(to right, ${stops.join(",")})`;
}
