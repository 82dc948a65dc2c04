// What a layer is: a channel and how it is shown. Plain data, also in the page's address.

import { MAPS, isSigned } from "./colours.js";

export const LINES = {
  "": "none", contour: "contour at the threshold", "contour alone": "contour alone", isolines: "isolines",
  "isolines alone": "isolines alone",
};
export const WINDOWS = { slide: "of this slide", run: "of the whole run", fixed: "fixed" };

/** The channel to begin with: the first; of two classes that both are explained, the second, as it is the positive. */
export function firstChannel(channels, classes) {
  const { method } = channels[0];
  const positive = classes.length === 2 && channels.find((c) => c.method === method && c.target === classes[1]);
  return positive || channels[0];
}

/** Whether a channel says how much patches disagree, not what the model looks at. */
export const isSpread = (channel) => channel.method === "spread";

/** Whether a channel is the second run minus the first. */
export const isDifference = (channel) => channel.method === "difference";

/** Whether a channel holds the clusters of the evidence. */
export const isClusters = (channel) => channel.method === "clusters";

/** Whether a channel holds classes and not numbers: the most probable class and its probability, or clusters. */
export const isClasses = (channel) => channel.method === "classes" || isClusters(channel);

/** Channels of one kind share their colours. */
export const kindOf = (channel) => (isSpread(channel) || isDifference(channel) || isClasses(channel) ? channel.method : "map");

/** The layer that a channel begins with; the `order`-th of a view. */
export function fresh(channel, order = 0) {
  const singles = ["inferno", "blue", "green", "pink", "orange"];
  const layer = {
    channel: channel.label,
    on: true,
    map: { spread: "viridis", difference: "coolwarm", classes: "classes", clusters: "classes" }[channel.method] || singles[order % singles.length],
    opacity: isClusters(channel) ? 0.5 : 0.7, // what lies in a cluster is to be seen
    threshold: null,
    kind: channel.run_window ? "run" : "slide",
    window: [0, 1],
    fade: true,
    gamma: 1,
    lines: "",
    hidden: [], // numbers of classes
  };
  return withWindow(layer, channel, layer.kind);
}

/** The layer with the window of a kind: `slide`, `run`, or `fixed` at what it is now or at `given`. */
export function withWindow(layer, channel, kind, given = layer.window) {
  const known = kind === "run" ? channel.run_window : kind === "slide" ? channel.window : null;
  const [low, high] = known || given;
  const window = known && isSigned(layer.map) ? [-high, high] : [low, high];
  return { ...layer, kind: known ? kind : "fixed", window };
}

/** The layer as text for the address. */
export function written(layer) {
  const parts = [layer.channel, layer.on ? "on" : "off", layer.map, layer.opacity, layer.kind];
  parts.push(layer.kind === "fixed" ? layer.window.map(plain).join("..") : "");
  parts.push(layer.threshold === null ? "" : plain(layer.threshold), layer.fade ? "fade" : "full");
  if (layer.gamma !== 1 || layer.lines || layer.hidden.length) parts.push(plain(layer.gamma), layer.lines);
  if (layer.hidden.length) parts.push(layer.hidden.join("."));
  return parts.map((part) => String(part).replace(/[%~;]/g, escaped)).join("~");
}

/** The layer that `written` made a text of; null where it is none, or of no channel there is. */
export function read(text, channels) {
  const parts = text.split("~").map(decodeURIComponent);
  const channel = channels.find(({ label }) => label === parts[0]);
  if (!channel || ![8, 10, 11].includes(parts.length)) return null;
  const gamma = Number(parts[8] || 1);
  const opacity = Number(parts[3]);
  const threshold = parts[6] === "" ? null : Number(parts[6]);
  const layer = {
    ...fresh(channel),
    on: parts[1] === "on",
    map: isClasses(channel) ? "classes" : MAPS.includes(parts[2]) ? parts[2] : "inferno",
    opacity: opacity >= 0 && opacity <= 1 ? opacity : 0.7,
    threshold: Number.isFinite(threshold) ? threshold : null,
    fade: parts[7] === "fade",
    gamma: gamma >= 0.2 && gamma <= 5 ? gamma : 1,
    lines: (parts[9] || "") in LINES ? parts[9] || "" : "",
    hidden: (parts[10] || "").split(".").filter((number) => /^\d{1,3}$/.test(number)).map(Number),
  };
  const given = parts[5].split("..").map(Number);
  const usable = given.length === 2 && given.every(Number.isFinite) && given[0] < given[1];
  return withWindow(layer, channel, parts[4], usable ? given : channel.window);
}

const escaped = (sign) => `%${sign.charCodeAt(0).toString(16)}`;
const plain = (value) => String(Number(value.toPrecision(6)));
