// The highest patches of all slides, by class, site, quality and cluster; a click leads to the place.

import { element, find, option, short } from "./dom.js";
import * as server from "./server.js";

const COUNT = 60;
const AGAIN = 2000; // ms, while slides are still read
const FLAGS = { "": "all", none: "without flags", pen: "pen", glass: "bare glass", blur: "blurred" };

export class ArchiveTop {
  constructor(run, evidence) {
    this.run = run;
    this.evidence = evidence;
    const positive = run.classes.length === 2 ? run.classes[1] : run.classes[0];
    find("top-class").append(...run.classes.map((label) => option(label, label, label === positive)));
    find("top-flag").append(...Object.entries(FLAGS).map(([key, text]) => option(key, text)));
    find("top-site").append(option("", "all"));
    for (const id of ["top-class", "top-site", "top-flag", "top-cluster"]) find(id).addEventListener("change", () => this.load());
  }

  get isShown() {
    return !find("top-patches").hidden;
  }

  show(shown) {
    for (const id of ["top-head", "top-patches"]) find(id).hidden = !shown;
    if (shown) this.load();
    else clearTimeout(this.waiting);
  }

  async load() {
    clearTimeout(this.waiting);
    this.wanted?.abort();
    this.wanted = new AbortController();
    const [label, site, flag, cluster] = ["class", "site", "flag", "cluster"].map((name) => find(`top-${name}`).value);
    const values = { class: label, site, flag, cluster, count: COUNT };
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
    this.offerClusters();
    const reading = found.collected < found.finished;
    find("top-found").textContent = `of ${found.collected} slide${found.collected === 1 ? "" : "s"}${reading ? ` so far, of ${found.finished}` : ""}`;
    find("top-patches").replaceChildren(...found.patches.map((patch) => patchItem(patch, `${label} ${short(patch.value)}`)));
    if (reading && this.isShown && !find("gallery").hidden) this.waiting = setTimeout(() => this.load(), AGAIN);
  }

  offerClusters() {
    const { clusters } = this.evidence;
    const select = find("top-cluster");
    find("top-cluster-label").hidden = !clusters.length;
    const known = [...select.options].map(({ textContent }) => textContent).join();
    if (known === ["all", ...clusters.map(({ label }) => label)].join()) return;
    const chosen = select.value;
    select.replaceChildren(option("", "all"), ...clusters.map(({ number, label }) =>
      option(String(number), label, String(number) === chosen)));
  }
}

/** A patch in a list of patches of many slides, which leads to its place; `more` is added to the address. */
export function patchItem(patch, text, more = "") {
  const address = `#${new URLSearchParams({ slide: patch.slide, patch: patch.number, jump: "1" })}${more && `&${more}`}`;
  const flags = patch.flags.map((flag) => FLAGS[flag]).join(", ");
  const image = element("img", { src: server.patchPicture(patch, patch.number), alt: "", loading: "lazy" });
  image.addEventListener("error", () => image.replaceWith(element("span", { class: "no-picture" }, "no picture")));
  return element("li", {}, element("a", {
    href: address, title: `${patch.slide}, patch ${patch.number}`,
  }, image, element("span", {}, text),
  element("span", { class: "facts" }, [patch.slide, patch.site, flags].filter(Boolean).join(" · "))));
}
