// Annotations of a slide: outlines by class over each view, their legend, and how well the channels agree with them.

import { element, fill, find, option, say, short } from "./dom.js";
import { Outlines, strokeOutline } from "./overlay.js";
import * as server from "./server.js";

const [WIDE, HIGH] = [256, 96]; // of the chart of Dice

export class Annotations {
  /** `changed()` is told when what is shown has changed. */
  constructor(changed) {
    this.changed = changed;
    this.hidden = new Set(); // names of classes
    this.on = true;
    this.clear();
  }

  clear() {
    this.facts = null;
    this.agreement = null;
    this.views = null;
  }

  get classes() {
    return this.facts?.classes || [];
  }

  /** Fetch those of a slide, and draw them over its views. */
  async show(slide, views) {
    this.clear();
    this.slide = slide;
    this.views = views;
    let facts;
    try {
      facts = await server.annotations(slide.key);
    } catch (error) {
      facts = { problem: error.message, classes: [] };
    }
    if (this.views !== views) return;
    facts.classes.forEach((found) => { found.lines = new Outlines(found.outlines); });
    this.facts = facts;
    this.draw();
    this.changed();
  }

  draw() {
    const shown = this.on ? this.classes.filter(({ name }) => !this.hidden.has(name)) : [];
    const paint = (context, view) => shown.forEach(({ lines, colour }) => strokeOutline(context, view, lines.path(view), colour));
    this.views?.paint("annotations", shown.length ? paint : null);
  }

  toggle() {
    if (!this.classes.length) {
      say("This slide has no annotations.");
      return;
    }
    this.on = !this.on;
    say(this.on ? "Annotations are shown" : "Annotations are hidden");
    this.draw();
    this.changed();
  }

  /** What the address says of them: null, or the names of hidden classes after "off" or "on". */
  get text() {
    if (this.on && !this.hidden.size) return null;
    return [this.on ? "on" : "off", ...this.hidden].map(encodeURIComponent).join(",");
  }

  set text(text) {
    const [on, ...hidden] = (text || "on").split(",").map(decodeURIComponent);
    this.on = on !== "off";
    this.hidden = new Set(hidden);
    this.draw();
  }

  /** The section of the layer panel; null where the slide has none. */
  section() {
    const { facts } = this;
    if (!facts || !(facts.problem || facts.classes.length)) return null;
    const body = facts.problem
      ? [element("p", { class: "error" }, facts.problem)]
      : [this.legend(), this.agreementBox()];
    return element("section", { id: "annotations", "aria-labelledby": "annotations-title" },
      element("div", { class: "panel-head" },
        element("h2", { id: "annotations-title" }, "Annotations"),
        facts.classes.length ? element("label", { title: "Key a" },
          element("input", { type: "checkbox", checked: this.on, id: "annotations-on", onchange: () => this.toggle() }),
          " Show") : null),
      facts.file ? element("p", { class: "facts" }, this.about()) : null,
      ...body);
  }

  about() {
    const { file, simplified_px: simplified } = this.facts;
    return simplified ? `${file}; outlines are simplified to within ${simplified} px because they have very many points` : file;
  }

  legend() {
    const item = ({ name, label, colour, outlines }) => {
      const swatch = element("span", { class: "swatch" });
      swatch.style.backgroundColor = colour;
      return element("li", {}, element("label", {},
        element("input", {
          type: "checkbox", checked: !this.hidden.has(name), "data-class": name,
          onchange: (event) => this.hide(name, !event.target.checked),
        }), swatch, element("span", { class: "class-name" }, label),
        element("span", { class: "facts" }, `${outlines.length} outline${outlines.length === 1 ? "" : "s"}`)));
    };
    return element("ul", { class: "legend-list" }, ...this.classes.map(item));
  }

  hide(name, hidden) {
    if (hidden) this.hidden.add(name);
    else this.hidden.delete(name);
    this.draw();
    this.changed();
  }

  agreementBox() {
    const box = element("details", { id: "agreement", open: this.open },
      element("summary", {}, "Agreement with the maps"), element("div", { id: "agreement-body" }));
    box.addEventListener("toggle", () => {
      if (box.open === this.open) return;
      this.open = box.open;
      if (box.open) this.measure();
    });
    if (this.open) queueMicrotask(() => this.measure());
    return box;
  }

  /** Ask how well each channel agrees with the chosen class, and show it. */
  async measure() {
    const { slide } = this;
    const targets = slide.channels.map(({ target }) => target);
    const known = this.classes.map(({ name }) => name);
    if (!known.includes(this.against)) this.against = known.find((name) => targets.includes(name)) ?? known[0];
    if (this.agreement?.name !== this.against) {
      this.drawAgreement(element("p", { role: "status" }, "Measuring on the whole slide …"));
      try {
        const found = await server.agreement(slide.key, this.against);
        if (this.slide !== slide) return;
        this.agreement = { name: this.against, found };
      } catch (error) {
        this.drawAgreement(this.choice(), element("p", { class: "error" }, error.message));
        return;
      }
    }
    this.drawAgreement(this.choice(), ...this.tables(this.agreement.found));
  }

  drawAgreement(...parts) {
    const body = find("agreement-body");
    if (body) fill(body, ...parts);
  }

  choice() {
    return element("label", { class: "row" }, element("span", {}, "Class"),
      element("select", {
        id: "agreement-class", onchange: (event) => { this.against = event.target.value; this.measure(); },
      }, ...this.classes.map(({ name, label }) => option(name, label, name === this.against))));
  }

  tables(found) {
    if (!found.annotated || found.annotated === found.pixels) {
      return [element("p", {}, found.annotated
        ? "All that was explained lies in this class: there is nothing to compare it with."
        : "Nothing that was explained lies in this class.")];
    }
    const head = (...names) => element("thead", {}, element("tr", {}, ...names.map(([text, title]) =>
      element("th", { scope: "col", title }, text))));
    const row = (label, ...values) => element("tr", {}, element("th", { scope: "row" }, label),
      ...values.map((value) => element("td", {}, value)));
    const [first] = found.channels;
    const rows = found.channels.map((channel) =>
      row(channel.label, short(channel.auroc), short(channel.ap), `${short(channel.dice)} from ${short(channel.threshold)}`));
    const parts = [
      element("p", { class: "facts" },
        `${percent(found.annotated / found.pixels)} of the explained area is in this class. By chance AUROC is 0.5 ` +
        `and AP ${short(first.chance)}. Pixels of ${short(found.um_per_px)} µm.`),
      element("table", { class: "agreement" },
        head(["channel", ""], ["AUROC", "area under the ROC curve"], ["AP", "average precision"],
          ["best Dice", "largest Dice of all thresholds, and the threshold"]),
        element("tbody", {}, ...rows)),
      this.chart(found),
    ];
    if (found.lesions) parts.push(...this.frocTable(found, row, head));
    return parts;
  }

  frocTable(found, row, head) {
    const rates = found.channels[0].froc.rates;
    return [
      element("h3", {}, `Lesions found (FROC), of ${found.lesions}`),
      element("p", { class: "facts" }, "Share of the lesions with a peak of the map in them, by how many higher or " +
        "equal peaks outside are allowed; the score is the mean of these shares."),
      element("table", { class: "agreement" },
        head(["channel", ""], ...rates.slice(2).map((rate) => [`${rate}`, `at most ${rate} false positives`]),
          ["score", "mean at 1/4, 1/2, 1, 2, 4 and 8 false positives"]),
        element("tbody", {}, ...found.channels.map(({ label, froc }) =>
          row(label, ...froc.sensitivity.slice(2).map(short), short(froc.score))))),
    ];
  }

  /** Dice over the thresholds of a channel, with the best marked. */
  chart(found) {
    const label = found.channels.some((channel) => channel.label === this.charted) ? this.charted : found.channels[0].label;
    const channel = found.channels.find((other) => other.label === label);
    const [low, high] = [channel.curve[0][0], channel.curve.at(-1)[0]];
    const x = (value) => (WIDE * (value - low)) / (high - low || 1);
    const y = (dice) => HIGH * (1 - dice);
    const points = channel.curve.map(([threshold, dice]) => `${x(threshold).toFixed(1)},${y(dice).toFixed(1)}`);
    const picture = svg("svg", {
      viewBox: `-4 -6 ${WIDE + 8} ${HIGH + 12}`, class: "chart", role: "img",
      "aria-label": `Dice of ${label} over its thresholds; largest ${short(channel.dice)} from ${short(channel.threshold)}`,
    }, svg("line", { x1: 0, x2: WIDE, y1: HIGH, y2: HIGH, class: "axis" }),
    svg("line", { x1: 0, x2: 0, y1: 0, y2: HIGH, class: "axis" }),
    svg("polyline", { points: points.join(" ") }),
    svg("circle", { cx: x(channel.threshold), cy: y(channel.dice), r: 4 }));
    return element("figure", { class: "dice" },
      element("figcaption", {}, "Dice (0 to 1) over the threshold of ",
        element("select", {
          "aria-label": "Channel of the chart",
          onchange: (event) => { this.charted = event.target.value; this.measure(); },
        }, ...found.channels.map((other) => option(other.label, other.label, other.label === label)))),
      picture,
      element("span", { class: "bar-row" }, short(low), element("span", { class: "gap" }), short(high)));
  }
}

const percent = (share) => `${short(100 * share)}%`;

function svg(tag, settings, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(settings)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
