// The patches with the highest values, as a strip; a click jumps to the place.

import { element, find, option, short } from "./dom.js";
import * as server from "./server.js";

const COUNT = 30;

export class Strip {
  constructor(run, chosen) {
    this.run = run;
    this.chosen = chosen;
    this.element = find("strip");
    this.by = null;
    this.order = "down";
  }

  get isShown() {
    return !this.element.hidden;
  }

  hide() {
    this.element.hidden = true;
  }

  async show(slide) {
    this.slide = slide;
    this.element.hidden = false;
    if (!slide.table) {
      this.element.replaceChildren(element("p", {}, "There is no table of patches yet."));
      return;
    }
    try {
      this.columns ||= (await server.top(slide.key, "", 0, "down")).columns;
      const last = this.run.classes.at(-1);
      this.by ||= this.columns.find((name) => name === `probability_${last}`) || this.columns[0];
      const { patches } = await server.top(slide.key, this.by, COUNT, this.order);
      if (this.slide === slide) this.draw(patches);
    } catch (error) {
      this.element.replaceChildren(element("p", {}, error.message));
    }
  }

  draw(patches) {
    const change = (name) => (event) => { this[name] = event.target.value; this.show(this.slide); };
    const head = element("div", { class: "strip-head" },
      element("select", { "aria-label": "Highest or lowest", onchange: change("order") },
        option("down", "Highest", this.order === "down"), option("up", "Lowest", this.order === "up")),
      element("select", { "aria-label": "By which value", id: "strip-by", onchange: change("by") },
        ...this.columns.map((name) => option(name, name.replaceAll("_", " "), name === this.by))));
    const list = element("ol", { class: "strip-list" }, ...patches.map((patch) => element("li", {}, this.item(patch))));
    this.element.replaceChildren(head, list);
  }

  item(patch) {
    const picture = this.slide.slide.problem
      ? element("span", { class: "no-picture" }, String(patch.number))
      : element("img", { src: server.patchPicture(this.slide, patch.number), alt: "", loading: "lazy" });
    return element("button", {
      type: "button", "data-patch": String(patch.number), "aria-label": `Patch ${patch.number}: ${short(patch.value)}`,
      onclick: () => this.chosen(patch.number),
    }, picture, element("span", {}, short(patch.value)));
  }
}
