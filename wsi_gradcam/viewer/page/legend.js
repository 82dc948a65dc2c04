// The colour bars of a view.

import { classColour, gradient } from "./colours.js";
import { element, short } from "./dom.js";
import { isClasses, isDifference, isSpread } from "./layers.js";

export const UNITS = {
  logit: "logits", drop: "logits lost where covered", probability: "probability", arbitrary: "arbitrary unit",
};

/** Show a bar for each layer that is on. */
export function showLegend(pane, layers) {
  pane.legend?.remove();
  const shown = layers.filter(({ on }) => on);
  pane.legend = element("div", { class: "legend" }, ...shown.map((layer) => bar(layer, pane.channel(layer))));
  if (!shown.length) pane.legend.append(element("span", {}, "slide alone"));
  pane.element.append(pane.legend);
}

/** The classes with their colours. */
function classes(layer, channel) {
  const above = layer.threshold === null ? "" : `, from a probability of ${short(layer.threshold)}`;
  const item = (name, number) => {
    const swatch = element("span", { class: "swatch" });
    swatch.style.backgroundColor = channel.colours?.[number] ?? classColour(number);
    return layer.hidden.includes(number) ? null : element("span", { class: "class-item" }, swatch, name);
  };
  return element("div", {}, element("span", { class: "bar-title" }, `${channel.label}${above}`),
    element("span", { class: "class-items" }, ...channel.classes.map(item).filter(Boolean)));
}

function bar(layer, channel) {
  if (isClasses(channel)) return classes(layer, channel);
  const scale = element("span", { class: "bar" });
  scale.style.backgroundImage = gradient(layer);
  const [low, high] = layer.window;
  const above = layer.threshold === null ? "" : `, from ${short(layer.threshold)}`;
  return element(
    "div", {},
    element("span", { class: "bar-title" }, `${channel.label} (${UNITS[channel.unit]}${above})`),
    element("span", { class: "bar-row" }, short(low), scale, short(high)),
    isSpread(channel) ? element("span", { class: "bar-title" }, "high: overlapping patches disagree") : null,
    isDifference(channel) ? element("span", { class: "bar-title" }, "second run minus first: red is more") : null,
  );
}
