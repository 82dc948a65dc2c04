// The colour bars of a view.

import { gradient } from "./colours.js";
import { element, short } from "./dom.js";
import { isDifference, isSpread } from "./layers.js";

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

function bar(layer, channel) {
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
