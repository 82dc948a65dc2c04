// The panel that sets the layers of the view that is worked on.

import { MAPS, classColour, isSigned } from "./colours.js";
import { element, fill, find, option, short } from "./dom.js";
import { LINES, WINDOWS, fresh, isClasses, isClusters, kindOf, withWindow } from "./layers.js";

const SLIDER = 1000; // steps

export class Controls {
  /** `changed(layers, smooth)` is told of every change; `chosen(view)` of the view that is set. */
  constructor(events) {
    this.events = events;
    this.element = find("layers");
    this.smooth = true;
  }

  /** Show the layers of view number `active` of `views`. */
  show(slide, layers, active, views, more = []) {
    this.slide = slide;
    this.layers = layers;
    const { id, scrollTop } = { id: document.activeElement?.id, scrollTop: this.element.scrollTop };
    fill(
      this.element,
      element("h2", {}, "Layers"),
      views > 1 ? this.viewChoice(active) : null,
      ...this.emptyText(),
      ...layers.map((_, i) => this.box(i)).reverse(), // the uppermost first, as it lies
      slide.channels.length ? this.foot() : null,
      ...more,
    );
    this.element.scrollTop = scrollTop;
    const held = id && find(id);
    if (held && this.element.contains(held)) held.focus();
  }

  emptyText() {
    const { slide, layers } = this;
    if (!slide.channels.length) return [element("p", {}, "This slide has no heatmap.")];
    return layers.length ? [] : [element("p", {}, "No layer: the slide alone.")];
  }

  viewChoice(active) {
    const choice = (number, text) =>
      element("label", {}, element("input", {
        type: "radio", name: "view", checked: number === active, onchange: () => this.events.chosen(number),
      }), ` ${text}`);
    return element("fieldset", { class: "view-choice" },
      element("legend", {}, "Settings of"), choice(0, "left view"), choice(1, "right view"));
  }

  box(number) {
    const layer = this.layers[number];
    const channel = this.slide.channels.find(({ label }) => label === layer.channel);
    const id = `layer-${number}`;
    const set = (more) => this.set(number, { ...this.layers[number], ...more });
    return element("fieldset", { class: "layer", id },
      element("legend", { class: "unseen" }, `Layer ${number + 1}: ${layer.channel}`),
      element("div", { class: "layer-head" },
        element("input", {
          type: "checkbox", checked: layer.on, "aria-label": `Show layer ${number + 1}`, "data-name": "on",
          onchange: (event) => set({ on: event.target.checked }),
        }),
        element("select", {
          "aria-label": `Channel of layer ${number + 1}`, "data-name": "channel",
          onchange: (event) => this.setChannel(number, event.target.value),
        }, ...this.slide.channels.map(({ label }) => option(label, label, label === layer.channel))),
        element("button", {
          type: "button", class: "small", "aria-label": `Remove layer ${number + 1}`, title: "Remove",
          onclick: () => this.remove(number),
        }, "✕"),
      ),
      isClasses(channel) ? null : row("Colours", element("select", {
        "data-name": "map", onchange: (event) => this.setMap(number, channel, event.target.value),
      }, ...MAPS.map((map) => option(map, map, map === layer.map)))),
      row("Opacity", slider({
        "data-name": "opacity", value: layer.opacity, low: 0, high: 1,
        text: (value) => `${Math.round(100 * value)}%`, oninput: (value) => set({ opacity: value }),
      })),
      ...(isClasses(channel) ? [] : this.windowRows(number, layer, channel)),
      isClasses(channel) ? this.classRows(layer, channel, set) : null,
      isClusters(channel) ? null : row("Hide below", ...this.threshold(number, layer, channel, set)),
      isClasses(channel) ? null : row("Gamma", slider({
        "data-name": "gamma", value: Math.log2(layer.gamma), low: -2, high: 2,
        text: (value) => short(2 ** value), oninput: (value) => set({ gamma: Math.abs(value) < 0.02 ? 1 : 2 ** value }),
      })),
      isClasses(channel) ? null : row("Lines", element("select", {
        "data-name": "lines", onchange: (event) => this.set(number, { ...this.layers[number], lines: event.target.value }, true),
      }, ...Object.entries(LINES).map(([kind, text]) => option(kind, text, kind === layer.lines)))),
      isClusters(channel) ? null : row("Fade low", element("input", {
        type: "checkbox", checked: layer.fade, "data-name": "fade",
        onchange: (event) => set({ fade: event.target.checked }),
      })),
    );
  }

  /** The classes with their colours, each of which can be hidden; clusters lead to their patches. */
  classRows(layer, channel, set) {
    const hidden = new Set(layer.hidden);
    const item = (name, number) => {
      const swatch = element("span", { class: "swatch" });
      swatch.style.backgroundColor = channel.colours?.[number] ?? classColour(number);
      const leads = isClusters(channel) && number < channel.classes.length - 1;
      return element("li", {}, element("label", {},
        element("input", {
          type: "checkbox", checked: !hidden.has(number), "data-name": `class-${number}`,
          onchange: (event) => {
            if (event.target.checked) hidden.delete(number);
            else hidden.add(number);
            set({ hidden: [...hidden].sort((a, b) => a - b) });
          },
        }), swatch, element("span", { class: "class-name" }, name)),
      leads ? element("a", { href: `#evidence=${number + 1}`, "aria-label": `Patches of ${name}` }, "patches") : null);
    };
    return element("ul", { class: "legend-list" }, ...channel.classes.map(item));
  }

  windowRows(number, layer, channel) {
    const kinds = Object.entries(WINDOWS).filter(([kind]) => kind !== "run" || channel.run_window);
    const limit = (i, name) => element("input", {
      type: "number", step: "any", value: String(Number(layer.window[i].toPrecision(5))), "aria-label": name,
      "data-name": i ? "high" : "low", onchange: (event) => this.setLimit(number, channel, i, event.target),
    });
    return [
      row("Window", element("select", {
        "data-name": "window",
        onchange: (event) => this.set(number, withWindow(layer, channel, event.target.value), true),
      }, ...kinds.map(([kind, text]) => option(kind, text, kind === layer.kind)))),
      element("div", { class: "limits" }, limit(0, "Low end of the window"), "to", limit(1, "High end of the window")),
    ];
  }

  /** A slider from the window's lower end, where nothing is hidden, and a field for any number. */
  threshold(number, layer, channel, set) {
    const low = isSigned(layer.map) ? 0 : layer.window[0];
    const high = isClasses(channel) ? 1 : Math.max(layer.window[1], channel.range[1]);
    const text = (value) => (value <= low ? "" : String(Number(value.toPrecision(5))));
    const field = element("input", {
      type: "number", step: "any", placeholder: "off", "aria-label": `Hide below, layer ${number + 1}`,
      "data-name": "threshold-number", value: layer.threshold === null ? "" : String(layer.threshold),
      onchange: (event) => this.setThreshold(number, event.target),
    });
    const value = layer.threshold === null ? low : Math.min(high, Math.max(low, layer.threshold));
    const shown = slider({
      "data-name": "threshold", value, low, high, text: (v) => (v <= low ? "off" : short(v)),
      oninput: (v) => { field.value = text(v); set({ threshold: v <= low ? null : v }); },
    });
    shown.querySelector("output").replaceWith(field);
    return [shown];
  }

  setThreshold(number, input) {
    const usable = !input.validity.badInput && Number.isFinite(Number(input.value));
    input.setAttribute("aria-invalid", String(!usable));
    const threshold = input.value === "" ? null : Number(input.value);
    if (usable) this.set(number, { ...this.layers[number], threshold }, true);
  }

  foot() {
    const smooth = element("input", {
      type: "checkbox", checked: this.smooth, "data-name": "smooth",
      onchange: (event) => { this.smooth = event.target.checked; this.events.changed(this.layers); },
    });
    return element("div", { class: "layer-foot" },
      element("button", { type: "button", id: "add-layer", onclick: () => this.add() }, "Add layer"),
      element("label", {}, smooth, " Smooth pixels"));
  }

  add() {
    const used = new Set(this.layers.map(({ channel }) => channel));
    const next = this.slide.channels.find(({ label }) => !used.has(label)) || this.slide.channels[0];
    this.replace([...this.layers, fresh(next, this.layers.length)]);
  }

  remove(number) {
    this.replace(this.layers.filter((_, i) => i !== number));
    (this.element.querySelector(".layer select") || find("add-layer")).focus();
  }

  setChannel(number, label) {
    const channel = this.slide.channels.find((other) => other.label === label);
    const { on, map, opacity, fade, gamma, lines, channel: before } = this.layers[number];
    const layer = { ...fresh(channel, number), on, opacity, fade, gamma, lines };
    const old = this.slide.channels.find((other) => other.label === before);
    if (kindOf(old) === kindOf(channel)) layer.map = map; // two things never look alike by chance
    this.set(number, withWindow(layer, channel, layer.kind), true);
  }

  setMap(number, channel, map) {
    const layer = { ...this.layers[number], map };
    this.set(number, withWindow(layer, channel, layer.kind), true);
  }

  setLimit(number, channel, which, input) {
    const window = [...this.layers[number].window];
    window[which] = Number(input.value);
    const usable = input.value !== "" && window.every(Number.isFinite) && window[0] < window[1];
    input.setAttribute("aria-invalid", String(!usable));
    if (usable) this.set(number, withWindow(this.layers[number], channel, "fixed", window), true);
  }

  set(number, layer, rebuilt = false) {
    const layers = this.layers.map((other, i) => (i === number ? layer : other));
    if (rebuilt) this.replace(layers);
    else {
      this.layers = layers;
      this.events.changed(layers);
    }
  }

  /** Take other layers and show the panel anew, with the focus where it was. */
  replace(layers) {
    const box = document.activeElement.closest?.(".layer");
    const name = document.activeElement.dataset?.name;
    this.layers = layers;
    this.events.changed(layers, true);
    if (box && name) find(box.id)?.querySelector(`[data-name="${name}"]`)?.focus();
  }
}

function row(text, ...controls) {
  return element("label", { class: "row" }, element("span", {}, text), ...controls);
}

/** A slider from low to high that shows its value as text. */
function slider({ value, low, high, text, oninput, ...more }) {
  const shown = element("output", {}, text(value));
  const input = element("input", {
    type: "range", min: "0", max: String(SLIDER), ...more,
    value: String(Math.round(((value - low) / (high - low || 1)) * SLIDER)), "aria-valuetext": text(value),
    oninput: (event) => {
      const now = low + ((high - low) * event.target.value) / SLIDER;
      shown.textContent = text(now);
      event.target.setAttribute("aria-valuetext", text(now));
      oninput(now);
    },
  });
  return element("span", { class: "slider" }, input, shown);
}
