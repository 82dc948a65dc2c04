// The slides of the run: pictures with scores, searched and sorted by the server, a page at a time.

import { recolour, table } from "./colours.js";
import { element, find, later, option, shareBar, short } from "./dom.js";
import { firstChannel, fresh } from "./layers.js";
import * as server from "./server.js";

const PAGE = 24;
const STATES = { ok: "explained", failed: "failed", no_tissue: "no tissue", unfinished: "not finished" };
const WAITS = 2000; // until scores are asked for again

export class Gallery {
  constructor(run) {
    this.run = run;
    this.slides = [];
    this.wanted = null;
    this.fill();
    const again = later(150, () => this.load());
    find("search").addEventListener("input", again);
    find("status").addEventListener("change", again);
    find("sort").addEventListener("change", again);
    find("thumb-channel").addEventListener("change", () => this.repaint());
    find("more").addEventListener("click", () => this.load(this.slides.length));
    this.painter = new IntersectionObserver((seen) => this.paint(seen), { rootMargin: "300px" });
  }

  fill() {
    const { classes, slide_level: slideLevel } = this.run;
    const answers = slideLevel ? classes.map((label) => option(`answer:${label}:down`, `answer ${label}`)) : [];
    find("status").append(option("", "all"), ...Object.entries(STATES).map(([key, text]) => option(key, text)));
    const differences = this.run.second
      ? [option("difference:maps:down", "disagreement of maps"), option("difference:probabilities:down", "change of probabilities")]
      : [];
    find("sort").append(
      option("name", "name"), ...differences, option("status", "status"), option("patches:down", "patches"), ...answers,
      ...classes.map((label) => option(`share:${label}:down`, `share of ${label}`)),
      ...classes.map((label) => option(`top:${label}:down`, `highest ${label}`)),
    );
  }

  get isShown() {
    return !find("gallery").hidden;
  }

  /** Show the slides, or of other lists the head alone. */
  async show(slides) {
    find("gallery").hidden = false;
    find("cards").hidden = !slides;
    find("gallery").classList.toggle("others", !slides);
    if (slides) await this.load();
    else clearTimeout(this.waiting);
  }

  hide() {
    find("gallery").hidden = true;
    clearTimeout(this.waiting);
  }

  /** The next or previous slide of the list that is shown. */
  beside(key, step) {
    const at = this.slides.findIndex((slide) => slide.key === key);
    return at < 0 ? this.slides[0] : this.slides[at + step];
  }

  async load(offset = 0) {
    this.wanted?.abort();
    this.wanted = new AbortController();
    clearTimeout(this.waiting);
    const sort = find("sort").value;
    const values = {
      search: find("search").value, status: find("status").value, offset, limit: PAGE,
      sort: sort.replace(/:down$/, ""), order: sort.endsWith(":down") ? "down" : "up",
    };
    try {
      const page = await server.slides(values, this.wanted.signal);
      this.slides = offset ? [...this.slides, ...page.slides] : page.slides;
      this.draw(page, offset);
    } catch (error) {
      if (error.name !== "AbortError") find("found").textContent = error.message;
    }
  }

  draw(page, offset) {
    const cards = page.slides.map((slide) => this.card(slide));
    if (offset) find("cards").append(...cards);
    else find("cards").replaceChildren(...cards);
    const scoring = page.scored < (page.counts.ok || 0) ? `, ${page.scored} scored so far` : "";
    find("found").textContent = `${page.found} of ${page.total} slides${scoring}`;
    find("more").hidden = this.slides.length >= page.found;
    if (scoring && this.isShown && !offset) this.waiting = setTimeout(() => this.load(), WAITS);
  }

  card(slide) {
    const folder = slide.id.slice(0, slide.id.lastIndexOf("/") + 1);
    const picture = element("div", { class: "thumb" });
    picture.slide = slide;
    const facts = [`${slide.patches.toLocaleString("en")} patches`];
    if (slide.unreadable) facts.push(`${slide.unreadable} unreadable`);
    const made = element("li", { class: `card ${slide.status}` },
      element("a", { href: `#${new URLSearchParams({ slide: slide.id })}` },
        picture,
        element("span", { class: "folder" }, folder || " "),
        element("span", { class: "name" }, slide.id.slice(folder.length)),
        element("span", { class: "facts" }, element("span", { class: "badge" }, STATES[slide.status] || slide.status),
          slide.status === "failed" ? "" : ` ${facts.join(", ")}`),
      ),
      slide.answer.length ? this.answer(slide.answer) : null,
      slide.error ? element("p", { class: "error", title: slide.error }, slide.error) : null,
      slide.scores ? this.scores(slide.scores) : null,
      this.difference(slide.difference),
    );
    this.painter.observe(picture);
    return made;
  }

  /** What a slide-level model answers for the slide. */
  answer(answer) {
    return element("dl", { class: "scores answer" }, ...answer.map(({ label, logit, probability }) =>
      element("div", {},
        element("dt", {}, label),
        element("dd", { title: `answer for the slide; logit ${short(logit)}` },
          shareBar(probability), ` ${short(probability)}`))));
  }

  /** How much the second run differs. */
  difference({ maps, probabilities }) {
    const rows = [
      ["maps disagree", maps, "1 - Spearman's correlation of the maps of both runs: 0 the same order, 1 none, 2 the opposite"],
      ["probabilities change by", probabilities, "mean of the differences without sign"],
    ].filter(([, value]) => value !== undefined);
    if (!rows.length) return null;
    return element("dl", { class: "scores" }, ...rows.map(([name, value, title]) =>
      element("div", {}, element("dt", {}, name), element("dd", { title }, short(value)))));
  }

  scores(scores) {
    const alone = this.run.slide_level ? ", each as a slide of its own" : "";
    return element("dl", { class: "scores" }, ...Object.entries(scores).map(([label, { share, top }]) =>
      element("div", {},
        element("dt", {}, label),
        element("dd", { title: `share of the patches called this class; mean probability of the ten highest patches${alone}` },
          shareBar(share),
          ` ${(100 * share).toFixed(1)}%, top ${top.toFixed(2)}`))));
  }

  paint(seen) {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      this.painter.unobserve(target);
      this.paintThumb(target).catch(() => target.classList.add("empty"));
    }
  }

  /** The slide, small, with the chosen channel over it, or the first. */
  async paintThumb(target) {
    if (target.slide.status === "failed") return target.classList.add("empty");
    const facts = await server.slide(target.slide.key);
    if (!facts.slide.problem) {
      target.append(element("img", { src: server.thumb(facts), alt: "", loading: "lazy" }));
    }
    if (!facts.heat) return undefined;
    this.offer(facts.channels);
    const chosen = facts.channels.find(({ label }) => label === find("thumb-channel").value);
    const canvas = await heatCanvas(facts, chosen || firstChannel(facts.channels, this.run.classes));
    // The heatmap's last pixels reach beyond the slide.
    const heat = chosen?.heat || facts.heat;
    const [height, width] = heat.size_px.map((size, i) => size / facts.size_px[i]);
    canvas.style.width = `${100 * width}%`;
    canvas.style.height = `${100 * height}%`;
    const frame = element("div", { class: "thumb-frame" }, ...target.children, canvas);
    frame.classList.toggle("wide", facts.size_px[1] / facts.size_px[0] > 1.2); // than the card's picture is
    frame.style.aspectRatio = `${facts.size_px[1]} / ${facts.size_px[0]}`;
    target.replaceChildren(frame);
    return undefined;
  }

  /** Offer the channels of a slide for the thumbnails. */
  offer(channels) {
    const select = find("thumb-channel");
    if (select.options.length || channels.length < 2) return;
    const first = firstChannel(channels, this.run.classes).label;
    select.append(...channels.map(({ label }) => option(label, label, label === first)));
    find("thumb-channel-label").hidden = false;
  }

  repaint() {
    for (const target of find("cards").querySelectorAll(".thumb:not(.empty)")) {
      target.replaceChildren();
      this.painter.observe(target);
    }
  }
}

async function heatCanvas(facts, channel) {
  const { levels, size_px: size, tile_px: tile } = channel.heat || facts.heat;
  const [height, width] = size.map((px) => Math.ceil(px / 2 ** (levels - 1)));
  const canvas = element("canvas", { width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const loads = [];
  for (let row = 0; row * tile < height; row += 1) {
    for (let column = 0; column * tile < width; column += 1) {
      const image = new Image();
      image.src = server.heatTile(facts, channel, levels - 1, row, column);
      loads.push(image.decode().then(() => context.drawImage(image, column * tile, row * tile)));
    }
  }
  await Promise.all(loads);
  const pixels = context.getImageData(0, 0, width, height);
  recolour(pixels.data, table(fresh(channel), channel));
  context.putImageData(pixels, 0, 0);
  canvas.style.opacity = "0.75";
  return canvas;
}
