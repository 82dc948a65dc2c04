// The panel of one patch: what the model saw, its own CAMs over it, numbers, quality, neighbours.

import { colours, shade } from "./colours.js";
import { element, fill, find, option, say, shareBar, short } from "./dom.js";
import { fresh } from "./layers.js";
import { UNITS } from "./legend.js";
import { patchPicture } from "./server.js";

const ARROWS = { E: "→", NE: "↗", N: "↑", NW: "↖", W: "←", SW: "↙", S: "↓", SE: "↘" };
const ORDER = ["NW", "N", "NE", "W", "", "E", "SW", "S", "SE"];
const BLURRED = 0.4; // sharp tissue measures 0.15 to 0.32, see quality.py
const NOTABLE = 0.05; // share of a patch

export class PatchPanel {
  /** `chosen(number)` is told of a neighbour, `closed()` of the end. */
  constructor(run, events) {
    this.run = run;
    this.events = events;
    this.element = find("patch");
    this.overlay = true;
    this.map = null; // label of the map that is shown
  }

  /** Show a patch of a slide; `layers` are those of the view, for the same colours. */
  show(slide, patch, layers) {
    Object.assign(this, { slide, patch, layers });
    this.element.hidden = false;
    const [height, width] = slide.patch.footprint_px;
    const middle = [patch.y + height / 2, patch.x + width / 2].map((px, i) => Math.round(px * slide.mpp[i]));
    fill(
      this.element,
      element("div", { class: "panel-head" },
        element("h2", {}, `Patch ${patch.number}`),
        element("button", { type: "button", class: "small", "aria-label": "Close patch", onclick: () => this.close() },
          "✕")),
      element("p", { class: "facts" },
        `level-0 px x ${patch.x}, y ${patch.y} · centre x ${middle[1].toLocaleString("en")} µm, ` +
        `y ${middle[0].toLocaleString("en")} µm`),
      this.picture(),
      this.mapChoice(),
      this.flags(),
      element("div", { id: "patch-mark" }),
      this.classTable(),
      this.events.clusters(patch),
      this.statistics(),
      this.neighbours(),
    );
    this.showMark();
    this.drawMap();
    say(`Patch ${patch.number}`);
  }

  /** The buttons that mark the patch, as soon as it is known whether marks can be kept. */
  showMark() {
    const place = find("patch-mark");
    if (place.childElementCount) return;
    const form = this.events.marking();
    if (form) place.append(form);
  }

  close() {
    this.element.hidden = true;
    this.patch = null;
    this.events.closed();
  }

  picture() {
    const { slide, patch, run } = this;
    this.canvas = element("canvas", { "aria-hidden": "true" });
    const [top, left, height, width] = slide.patch.view_px;
    const [down, across] = slide.patch.footprint_px;
    Object.assign(this.canvas.style, {
      top: `${(100 * top) / down}%`, left: `${(100 * left) / across}%`,
      width: `${(100 * width) / across}%`, height: `${(100 * height) / down}%`,
    });
    const image = slide.slide.problem
      ? element("p", { class: "no-picture" }, "the slide file is missing")
      : element("img", { src: patchPicture(slide, patch.number), alt: `patch ${patch.number} as the model saw it` });
    const frame = element("div", { class: "patch-picture" }, image, this.canvas);
    frame.style.aspectRatio = `${run.patch_px[1]} / ${run.patch_px[0]}`;
    return frame;
  }

  mapChoice() {
    const { maps } = this.patch;
    if (!maps.length || this.patch.status !== "ok") return null;
    if (!maps.some(({ label }) => label === this.map)) {
      const seen = this.layers.map(({ channel }) => channel);
      this.map = (maps.find(({ label }) => seen.includes(label)) || maps[0]).label;
    }
    return element("div", { class: "map-choice" },
      element("label", {}, element("input", {
        type: "checkbox", checked: this.overlay, id: "patch-overlay",
        onchange: (event) => { this.overlay = event.target.checked; this.drawMap(); },
      }), " CAM of "),
      element("select", {
        "aria-label": "Which explanation", id: "patch-map",
        onchange: (event) => { this.map = event.target.value; this.drawMap(); },
      }, ...maps.map(({ label }) => option(label, label, label === this.map))),
      element("span", { id: "patch-range", class: "facts" }));
  }

  /** The patch's own map, a cell a pixel, in the colours of the view's layer. */
  drawMap() {
    const shown = this.patch.maps.find(({ label }) => label === this.map);
    this.canvas.hidden = !(shown && this.overlay && this.patch.status === "ok");
    if (!shown) return;
    const channel = this.slide.channels[shown.channel];
    const layer = this.layers.find((other) => other.channel === channel.label) || fresh(channel);
    const rows = shown.values;
    const flat = rows.flat();
    Object.assign(this.canvas, { height: rows.length, width: rows[0].length });
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(rows[0].length, rows.length);
    const list = colours(layer.map);
    flat.forEach((value, i) => image.data.set(shade(layer, list, value), 4 * i));
    context.putImageData(image, 0, 0);
    this.canvas.style.opacity = layer.opacity;
    const range = find("patch-range");
    if (range) range.textContent = ` ${short(Math.min(...flat))} to ${short(Math.max(...flat))} ${UNITS[shown.unit]}`;
  }

  flags() {
    const { patch } = this;
    const found = [];
    const share = (name, text) => patch[name] > NOTABLE && found.push(`${text} on ${Math.round(100 * patch[name])}%`);
    if (patch.status !== "ok") found.push(`unreadable: ${patch.cause || "cause not known"}`);
    share("pen", "pen");
    share("glass", "bare glass");
    if (patch.blur > BLURRED) found.push(`blurred (${short(patch.blur)})`);
    const text = found.length ? found : ["no quality flags"];
    const kind = found.length ? "flag" : "flag fine";
    return element("p", { class: "flags" }, ...text.flatMap((flag) => [element("span", { class: kind }, flag), " "]));
  }

  classTable() {
    const { patch, run } = this;
    const row = (label) => element("tr", {},
      element("th", { scope: "row" }, label),
      element("td", {}, short(patch[`logit_${label}`])),
      element("td", {}, short(patch[`probability_${label}`])),
      element("td", {}, shareBar(patch[`probability_${label}`])));
    const alone = run.slide_level ? " of it alone" : "";
    const heads = ["class", `logit${alone}`, `probability${alone}`, ""].map((text) =>
      text ? element("th", { scope: "col" }, text) : element("td"));
    return element("table", {}, element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...run.classes.map(row)));
  }

  statistics() {
    const skipped = /^(number|y|x|status|cause|maps|neighbours|clusters)$|^(logit|probability)_/;
    const names = Object.keys(this.patch).filter((name) => !skipped.test(name));
    return element("details", {}, element("summary", {}, "All numbers"),
      element("table", {}, element("tbody", {}, ...names.map((name) =>
        element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, short(this.patch[name])))))));
  }

  neighbours() {
    const byDirection = Object.fromEntries(this.patch.neighbours.map((other) => [other.direction, other.number]));
    const cell = (direction) => {
      const number = direction ? byDirection[direction] : this.patch.number;
      if (number === undefined) return element("span", { class: "none" });
      const picture = this.slide.slide.problem
        ? element("span", {}, `${number}`)
        : element("img", { src: patchPicture(this.slide, number), alt: "", loading: "lazy" });
      if (!direction) return element("span", { class: "this" }, picture);
      return element("button", {
        type: "button", "aria-label": `Patch ${number}, ${ARROWS[direction]} ${direction}`, title: `patch ${number}`,
        onclick: () => this.events.chosen(number),
      }, picture);
    };
    return element("div", {}, element("h3", {}, "Neighbours"),
      element("div", { class: "neighbours" }, ...ORDER.map(cell)));
  }
}
