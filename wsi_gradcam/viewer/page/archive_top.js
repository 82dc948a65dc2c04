// The highest patches of all slides, by class, site and quality; a click leads to the place.

import { element, find, option, short } from "./dom.js";
import * as server from "./server.js";

const COUNT = 60;
const AGAIN = 2000; // ms, while slides are still read
const FLAGS = { "": "all", none: "without flags", pen: "pen", glass: "bare glass", blur: "blurred" };

export class ArchiveTop {
  constructor(run) {
    this.run = run;
    const positive = run.classes.length === 2 ? run.classes[1] : run.classes[0];
    find("top-class").append(...run.classes.map((label) => option(label, label, label === positive)));
    find("top-flag").append(...Object.entries(FLAGS).map(([key, text]) => option(key, text)));
    find("top-site").append(option("", "all"));
    for (const id of ["top-class", "top-site", "top-flag"]) find(id).addEventListener("change", () => this.load());
  }

  get isShown() {
    return !find("top-patches").hidden;
  }

  toggle() {
    const shown = !this.isShown;
    for (const id of ["top-head", "top-patches"]) find(id).hidden = !shown;
    find("cards").hidden = shown;
    find("gallery").classList.toggle("top", shown);
    find("gallery-top").setAttribute("aria-pressed", String(shown));
    if (shown) this.load();
  }

  async load() {
    clearTimeout(this.waiting);
    this.wanted?.abort();
    this.wanted = new AbortController();
    const values = { class: find("top-class").value, site: find("top-site").value, flag: find("top-flag").value, count: COUNT };
    try {
      this.draw(await server.archiveTop(values, this.wanted.signal), values.class);
    } catch (error) {
      if (error.name !== "AbortError") find("top-found").textContent = error.message;
    }
  }

  draw(found, label) {
    const site = find("top-site");
    if (site.options.length !== found.sites.length + 1) {
      const chosen = site.value;
      site.replaceChildren(option("", "all"), ...found.sites.map((name) => option(name, name, name === chosen)));
    }
    find("top-site-label").hidden = !found.sites.length;
    const reading = found.collected < found.finished;
    find("top-found").textContent = `of ${found.collected} slide${found.collected === 1 ? "" : "s"}${reading ? ` so far, of ${found.finished}` : ""}`;
    find("top-patches").replaceChildren(...found.patches.map((patch) => this.item(patch, label)));
    if (reading && this.isShown && !find("gallery").hidden) this.waiting = setTimeout(() => this.load(), AGAIN);
  }

  item(patch, label) {
    const address = `#${new URLSearchParams({ slide: patch.slide, patch: patch.number, jump: "1" })}`;
    const flags = patch.flags.map((flag) => FLAGS[flag]).join(", ");
    const image = element("img", { src: server.patchPicture(patch, patch.number), alt: "", loading: "lazy" });
    image.addEventListener("error", () => image.replaceWith(element("span", { class: "no-picture" }, "no picture")));
    return element("li", {}, element("a", {
      href: address, title: `${patch.slide}, patch ${patch.number}`,
    }, image, element("span", {}, `${label} ${short(patch.value)}`),
    element("span", { class: "facts" }, [patch.slide, patch.site, flags].filter(Boolean).join(" · "))));
  }
}
