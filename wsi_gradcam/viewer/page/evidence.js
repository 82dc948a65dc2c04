// What the model looks at: the clusters of `wsi-gradcam evidence`, their patches across the archive, and their places.

import { patchItem } from "./archive_top.js";
import { element, fill, find, option, say, shareBar, short } from "./dom.js";
import * as server from "./server.js";

const COUNT = 60;
const AGAIN = 2000; // ms, while slides are still read
const FRESH = 10000; // ms, after which evidence is asked for again
const PILLS = { shortcut: ["bad", "shortcut"], suspect: ["open", "artefact?"], uneven: ["open", "uneven"], evidence: ["good", "evidence"] };
const SUSPECTS = { ink: "ink", glass: "bare glass", blur: "blurred tissue", border: "the border of the patch" };

const percent = (share) => (share === null || share === undefined ? "–" : `${Number((100 * share).toFixed(1))}%`);

const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** The colour of a cluster, and its name. */
export function clusterName({ colour, label }) {
  const swatch = element("span", { class: "swatch" });
  swatch.style.backgroundColor = colour;
  return element("span", { class: "cluster-name" }, swatch, element("span", {}, label));
}

export class Evidence {
  constructor() {
    this.facts = { there: false, problem: null, clusters: [] };
    this.askedAt = -FRESH;
    this.site = "";
    this.element = find("evidence");
  }

  get clusters() {
    return this.facts.clusters;
  }

  cluster(number) {
    return this.clusters.find((cluster) => cluster.number === number);
  }

  /** Ask what there is, unless that was asked a moment ago. */
  async look(anew = false) {
    if (!anew && performance.now() - this.askedAt < FRESH) return;
    this.askedAt = performance.now();
    try {
      this.facts = await server.evidence();
    } catch (error) {
      this.facts = { there: false, problem: error.message, clusters: [] };
    }
    find("gallery-evidence").hidden = !(this.facts.there || this.facts.problem);
  }

  /** Show all clusters, or one. */
  async show(number) {
    this.number = number;
    clearTimeout(this.waiting);
    this.element.hidden = false;
    await this.look(true);
    if (this.number !== number || this.element.hidden) return;
    const chosen = this.cluster(number);
    if (chosen) await this.showCluster(chosen);
    else this.showAll();
    this.waitForMore();
  }

  hide() {
    this.element.hidden = true;
    clearTimeout(this.waiting);
  }

  waitForMore() {
    if (this.facts.collected < this.facts.finished && !this.element.hidden) {
      this.waiting = setTimeout(() => this.show(this.number), AGAIN);
    }
  }

  showAll() {
    const { facts } = this;
    fill(this.element, ...(facts.there ? [this.about(), ...this.overview()] : [element("p", { class: "error", role: "status" },
      facts.problem || "This run has no evidence yet: run wsi-gradcam evidence.")]));
  }

  about() {
    const { target, places, slides, clusters, report, can_name: canName } = this.facts;
    return element("p", { class: "facts" },
      `${counted(places, "place")} of ${counted(slides, "slide")}, sorted by what in them speaks for or against ` +
      `${target}: ${counted(clusters.length, "cluster")}. `,
      element("a", { href: report.slice(1), target: "_blank", rel: "noopener" }, "Report with all numbers"),
      canName ? ". A cluster can be named on its own page (F2 there); names appear in the report and exports when the command is run again."
        : ".");
  }

  overview() {
    const { facts } = this;
    if (!facts.worth_sorting) return [element("p", {}, `There is no evidence worth sorting. ${facts.learned}`)];
    return [
      element("h3", {}, "Findings"),
      element("ol", { id: "findings" }, ...facts.findings.map((finding) => element("li", {}, pill(finding.kind),
        element("a", { href: `#evidence=${finding.cluster}` }, finding.words)))),
      element("h3", {}, "Clusters"),
      element("ul", { id: "clusters" }, ...facts.clusters.map((cluster) => this.card(cluster))),
    ];
  }

  card(cluster) {
    return element("li", { class: "cluster-card" },
      element("a", { href: `#evidence=${cluster.number}`, "data-cluster": cluster.number },
        clusterName(cluster),
        element("span", { class: "facts" }, shareBar(cluster.share.value), ` ${this.shareText(cluster)}`),
        element("span", { class: "facts" }, `on ${cluster.slides} of ${counted(cluster.of_slides, "slide")}`, ...flags(cluster)),
        element("span", { class: "examples" }, ...cluster.examples.map((patch) =>
          element("img", { src: server.patchPicture(patch, patch.number), alt: "", loading: "lazy" })))));
  }

  shareText({ share, side }) {
    return `${percent(share.value)} of the evidence ${side} ${this.facts.target}`;
  }

  async showCluster(cluster) {
    const { facts } = this;
    const sites = element("select", { id: "cluster-site", onchange: (event) => { this.site = event.target.value; this.show(cluster.number); } },
      option("", "all"), ...facts.sites.map((name) => option(name, name, name === this.site)));
    const list = element("ul", { id: "cluster-patches", class: "patch-list" });
    const found = element("span", { role: "status", class: "facts" });
    const held = document.activeElement?.id;
    const typed = held === "cluster-name" ? find(held) : null; // it is built anew while slides are read
    fill(this.element,
      element("p", {}, element("a", { href: "#evidence", id: "all-clusters" }, "All clusters")),
      element("h3", { class: "cluster-title" }, clusterName(cluster), ...flags(cluster)),
      this.naming(cluster),
      this.numbers(cluster),
      element("div", { class: "gallery-head" }, facts.sites.length ? element("label", {}, "Site ", sites) : null, found),
      list);
    if (held) find(held)?.focus();
    if (typed && find("cluster-name")) Object.assign(find("cluster-name"), { value: typed.value, was: typed.was });
    try {
      const { patches, found: count } = await server.clusterPatches(cluster.number, { site: this.site, count: COUNT });
      const reading = facts.collected < facts.finished ? `, of ${facts.collected} of ${facts.finished} slides so far` : "";
      found.textContent = patches.length < count
        ? `the ${patches.length} patches to which it contributes most, of ${count}${reading}`
        : `${counted(count, "patch", "patches")} of the sample${reading}`;
      list.append(...patches.map((patch) => patchItem(patch, `contributes ${short(patch.value)}`, `evidence=${cluster.number}`)));
    } catch (error) {
      found.textContent = error.message;
    }
  }

  /** A field that names a cluster; what it was called is sent, too, so that no name of another window is lost. */
  naming(cluster) {
    if (!this.facts.can_name) return null;
    const field = element("input", {
      type: "text", id: "cluster-name", value: cluster.name, maxlength: "100", autocomplete: "off",
      placeholder: `cluster ${cluster.number}`,
      onkeydown: (event) => { if (event.key === "Enter") this.rename(cluster, field); },
    });
    field.was = cluster.name;
    return element("div", { class: "cluster-naming" },
      element("label", {}, "Name ", field),
      element("button", { type: "button", id: "name-cluster", title: "Key F2 leads to the field", onclick: () => this.rename(cluster, field) }, "Save"),
      element("span", { class: "error", id: "name-problem", role: "status" }));
  }

  async rename(cluster, field) {
    const name = field.value.trim();
    try {
      const found = await server.nameCluster({ cluster: cluster.number, name, was: field.was, state: this.facts.state });
      if (!found.kept) {
        field.was = found.name;
        throw new Error(`It is called ${found.name ? `“${found.name}”` : "nothing"} now; save again to rename it.`);
      }
      say(name ? `Cluster ${cluster.number} is called ${name}` : `Cluster ${cluster.number} no longer has a name`);
      field.blur();
      await this.show(cluster.number);
      find("name-cluster")?.focus();
    } catch (error) {
      if (this.number === cluster.number) find("name-problem").textContent = error.message;
    }
  }

  /** Lead the keyboard to the name of the cluster that is shown; false where none is. */
  editName() {
    const field = this.element.hidden ? null : find("cluster-name");
    field?.focus();
    field?.select();
    return Boolean(field);
  }

  numbers(cluster) {
    const { share, area, lift, slides, of_slides: all, probability, suspects, uneven, change } = cluster;
    const { target } = this.facts;
    const removed = this.facts.level === "slide"; // patches are taken out of the slide's bag
    const on = Object.entries(suspects).filter(([, value]) => value >= 0.05)
      .map(([name, value]) => `${percent(value)} on ${SUSPECTS[name] || name}`);
    const rows = [
      [`Share of the evidence ${cluster.side} ${target}`, `${percent(share.value)} (${percent(share.low)} to ${percent(share.high)})`],
      ["Share of the tissue", `${percent(area)}${lift === null ? "" : `; ${short(lift)} times as much evidence as area`}`],
      ["Slides", `${slides} of ${all}${uneven.length ? `, unevenly by ${uneven.join(" and ")}` : ""}`],
      [`Mean probability of ${target}${removed ? ", of its slides" : ""}`, short(probability)],
      [removed ? "Without it the slide's logit is" : "Covering it leaves the logit", change === null ? null
        : `${short(Math.abs(change))} ${change < 0 ? "lower" : "higher"} than ${removed ? "without" : "covering"} as much elsewhere`],
      ["Lies", on.join(", ") || null],
    ].filter(([, text]) => text !== null);
    return element("dl", { class: "cluster-facts" }, ...rows.map(([name, text]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, text))));
  }

  /** What the clusters contribute to a patch, for its panel; null where that is not known. */
  ofPatch(patch) {
    if (!this.clusters.length) return null;
    const rows = (patch.clusters || []).filter(({ cluster }) => this.cluster(cluster));
    const body = patch.clusters === null
      ? [element("p", { class: "facts" }, "This patch is not in the sample of the evidence.")]
      : rows.length ? [element("ul", { class: "patch-clusters" }, ...rows.map(({ cluster, share, contribution }) =>
        element("li", {}, element("a", { href: `#evidence=${cluster}` }, clusterName(this.cluster(cluster))),
          element("span", { class: "facts", title: `contribution ${short(contribution)}` }, percent(share)))))]
        : [element("p", { class: "facts" }, "No cell of this patch that was looked at is in a cluster.")];
    return element("div", { id: "patch-evidence" }, element("h3", {}, "Clusters of the evidence"), ...body);
  }
}

function pill(kind) {
  const [state, text] = PILLS[kind];
  return element("span", { class: `pill ${state}` }, text);
}

function flags({ shortcut, suspects, uneven }) {
  const found = [];
  if (shortcut) found.push(pill("shortcut"));
  if (Object.values(suspects).some((share) => share >= 0.5)) found.push(pill("suspect"));
  if (!shortcut && uneven.length) found.push(pill("uneven"));
  return found.flatMap((made) => [" ", made]);
}
