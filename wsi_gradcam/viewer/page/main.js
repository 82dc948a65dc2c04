// Puts the page together: which slide, which place, which panels, and the address that holds them.

import { formed, parsed } from "./address.js";
import { ArchiveTop } from "./archive_top.js";
import { Annotations } from "./annotations.js";
import { Controls } from "./controls.js";
import { element, find, later, length, say, short } from "./dom.js";
import { Evidence } from "./evidence.js";
import { Gallery } from "./gallery.js";
import { listen } from "./keys.js";
import { fresh, isClusters } from "./layers.js";
import { PatchPanel } from "./patch.js";
import { Marks } from "./marks.js";
import { magnification, umAt } from "./ruler.js";
import * as server from "./server.js";
import { Strip } from "./strip.js";
import { Measure, savePicture, startDark, toggleDark } from "./tools.js";
import { Views } from "./views.js";

const TIMES = [1, 5, 10, 20, 40];
const PATCH_SCREEN_PX = 220; // of a patch that is jumped to

/** Show a link of the bar, if there is something to show. */
function linkTo(name, address) {
  const link = find(name);
  link.hidden = !address;
  link.href = address ? address.slice(1) : "#"; // below the page's own address
}

/** The value of the `number`-th channel in words; of classes, the most probable one and its probability. */
function valueText(channels, number, { values, cluster }) {
  const { classes, method: kind } = channels[number];
  if (kind === "clusters") return cluster === null ? "not looked at" : classes[cluster - 1] ?? "–";
  if (!classes) return short(values?.[number]);
  const shares = classes.map((name) => values?.[channels.findIndex(
    ({ method, target, second }) => method === "probability" && target === name && !second)] ?? null);
  if (shares.includes(null)) return short(null);
  const most = Math.max(...shares);
  return `${classes[shares.indexOf(most)]} ${short(most)}`;
}

class App {
  constructor(run) {
    this.run = run;
    this.slide = null;
    this.views = null;
    this.turn = 0;
    this.gallery = new Gallery(run);
    this.evidence = new Evidence();
    this.archiveTop = new ArchiveTop(run, this.evidence);
    this.controls = new Controls({
      changed: (layers, rebuilt) => this.setLayers(layers, rebuilt),
      chosen: (number) => this.activate(number),
    });
    this.panel = new PatchPanel(run, {
      chosen: (number) => this.showPatch(number, true),
      closed: () => this.closePatch(),
      clusters: (patch) => this.evidence.ofPatch(patch),
      marking: () => this.marks.canWrite && this.marks.form((kind, text) => this.markPatch(kind, text), "patch-mark"),
    });
    this.strip = new Strip(run, (number) => this.showPatch(number, true));
    this.annotations = new Annotations(() => { this.showControls(); this.remember(); });
    this.marks = new Marks({
      changed: () => { this.showControls(); this.panel.patch && this.panel.showMark(); },
      goTo: (mark) => this.showMark(mark),
    });
    this.remember = later(150, () => this.writeAddress());
    this.askValues = later(60, (y, x) => this.showValues(y, x));
    this.measure = new Measure(this);
    startDark();
    this.buttons();
    this.keys();
    window.addEventListener("popstate", () => this.followAddress());
  }

  async start() {
    document.title = `${this.run.name} – wsi-gradcam`;
    if (parsed(location.hash).slide === null) {
      const { slides, total } = await server.slides({ limit: 1 });
      if (total === 1) history.replaceState(null, "", formed({ slide: slides[0].id, views: [] }));
    }
    await this.followAddress();
  }

  /** Go to another address, at once: setting location.hash is noticed later, and might be overwritten meanwhile. */
  go(address) {
    history.pushState(null, "", address);
    return this.followAddress();
  }

  /** Show what the address says. */
  async followAddress() {
    if (location.hash === this.written) return;
    this.turn += 1; // what an earlier address still waits for is not shown any more
    const { turn } = this;
    this.written = location.hash;
    const wanted = parsed(location.hash);
    try {
      if (wanted.slide === null) {
        await this.showGallery(wanted);
        return;
      }
      if (this.views && this.slide?.id === wanted.slide && (wanted.views.length || 1) === this.views.panes.length) {
        await this.changeView(wanted);
      } else await this.showSlide(wanted, turn);
    } catch (error) {
      if (turn !== this.turn) return;
      this.notice(`${wanted.slide}: ${error.message}`);
      say(error.message);
    }
  }

  async showSlide(wanted, turn) {
    this.closeSlide();
    document.body.classList.add("has-slide");
    this.gallery.hide();
    find("show-gallery").setAttribute("aria-pressed", "false");
    const [slide] = await Promise.all([server.slideNamed(wanted.slide), this.evidence.look()]);
    if (turn !== this.turn) return;
    this.slide = slide;
    find("title").textContent = slide.id;
    this.describe(slide);
    if (!slide.size_px || (slide.slide.problem && !slide.heat)) {
      document.body.dataset.ready = slide.key;
      return;
    }
    const views = new Views(slide, this.run.classes, {
      pointed: (y, x) => this.pointed(y, x),
      clicked: (y, x) => this.clicked(y, x),
      rested: () => this.remember(),
      activated: () => this.showControls(),
    });
    this.views = views;
    this.annotations.text = wanted.outlines;
    views.smooth = this.controls.smooth;
    views.turn = wanted.turn;
    await views.open(wanted.views);
    if (this.views !== views) return;
    find("beside").setAttribute("aria-pressed", String(views.panes.length > 1));
    if (this.strip.isShown) this.strip.show(slide);
    if (!wanted.centre) views.pane.home(true);
    await this.showPlace(wanted);
    if (this.views !== views) return;
    if (wanted.evidence !== null) this.showClusters();
    this.annotations.show(slide, views);
    this.marks.show(slide, views);
  }

  /** Another view of the slide that is shown. */
  async changeView(wanted) {
    if (wanted.views.length) await this.views.setTexts(wanted.views);
    if (wanted.evidence !== null) this.showClusters();
    this.annotations.text = wanted.outlines;
    this.views.turnTo(wanted.turn);
    if (wanted.patch === null && this.panel.patch) this.panel.close();
    await this.showPlace(wanted);
  }

  async showPlace(wanted) {
    this.showControls();
    if (wanted.centre) this.views.goTo(wanted.centre, wanted.um, true);
    if (wanted.patch !== null) await this.showPatch(wanted.patch, wanted.jumps);
    document.body.dataset.ready = this.slide.key;
    this.writeAddress();
  }

  closeSlide() {
    this.measure.stop();
    delete document.body.dataset.ready;
    this.views?.close();
    this.views = null;
    this.annotations.clear();
    this.marks.clear();
    this.slide = null;
    this.panel.element.hidden = true;
    this.panel.patch = null;
    this.notice("");
    find("place").textContent = "";
    find("values").textContent = "";
  }

  describe(slide) {
    linkTo("report", this.run.report);
    const state = find("state");
    state.hidden = slide.status === "ok";
    state.textContent = slide.status.replace("_", " ");
    linkTo("audit", slide.audit || this.run.audit);
    const answer = slide.answer.map(({ label, probability }) => `${label} ${short(probability)}`).join(" · ");
    find("answer").hidden = !answer;
    find("answer").textContent = answer;
    const lines = [];
    if (slide.slide.problem && slide.heat) {
      lines.push(`The slide cannot be shown, so the heatmap is shown alone. ${slide.slide.problem}`);
    }
    if (slide.heat_problem) lines.push(`No heatmap: ${slide.heat_problem}`);
    if (slide.second_problem) lines.push(`Not compared with ${this.run.second}: ${slide.second_problem}`);
    if (slide.spread_problem) lines.push(`The spread of the map cannot be shown: ${slide.spread_problem}`);
    if (slide.status === "no_tissue") lines.push("No tissue was found on this slide.");
    if (slide.mpp && Math.abs(slide.mpp[0] / slide.mpp[1] - 1) > 0.005) {
      lines.push(`Pixels are ${short(slide.mpp[1])} x ${short(slide.mpp[0])} µm (width x height) and are shown as squares.`);
    }
    this.notice(lines.join(" "));
  }

  notice(text) {
    find("notice").textContent = text;
    find("notice").hidden = !text;
  }

  /** Show all slides, the highest patches, or the evidence. */
  async showGallery({ top, evidence }) {
    const { turn } = this;
    this.closeSlide();
    this.strip.hide();
    document.body.classList.remove("has-slide");
    find("title").textContent = `${this.run.name}: ${this.run.model}${this.run.untrained ? " (untrained)" : ""}${
      this.run.second ? `, compared with ${this.run.second}` : ""}`;
    find("state").hidden = true;
    find("answer").hidden = true;
    linkTo("audit", this.run.audit);
    linkTo("report", this.run.report);
    const isEvidence = evidence !== null;
    find("gallery-title").textContent = isEvidence ? "Evidence" : top ? "Highest patches" : "Slides";
    find("show-gallery").setAttribute("aria-pressed", String(!top && !isEvidence));
    find("gallery-top").setAttribute("aria-pressed", String(top));
    find("gallery-evidence").setAttribute("aria-pressed", String(isEvidence));
    const asked = this.evidence.look();
    if (!isEvidence) this.evidence.hide();
    if (top) await asked;
    this.archiveTop.show(top);
    await this.gallery.show(!top && !isEvidence);
    if (isEvidence) await this.evidence.show(evidence);
    if (turn === this.turn) document.body.dataset.ready = "gallery";
  }

  showControls() {
    const { views, slide } = this;
    if (!views) return;
    this.controls.show(slide, views.layers[views.active], views.active, views.panes.length, [this.annotations.section(), this.marks.section()]);
  }

  setLayers(layers, rebuilt) {
    this.views.setSmooth(this.controls.smooth);
    this.views.setLayers(layers);
    if (rebuilt) this.showControls();
    if (this.panel.patch) {
      this.panel.layers = layers;
      this.panel.drawMap();
    }
    this.remember();
  }

  activate(number) {
    this.views.led(this.views.panes[number]);
    find("layers").querySelector(`input[name=view]:checked`)?.focus();
  }

  async toggleBeside() {
    if (!this.views) return;
    await this.views.toggleBeside();
    find("beside").setAttribute("aria-pressed", String(this.views.panes.length > 1));
    this.showControls();
    this.remember();
  }

  pointed(y, x) {
    const { slide } = this;
    const [height, width] = slide.size_px;
    if (y < 0 || x < 0 || y >= height || x >= width) {
      find("place").textContent = "";
      find("values").textContent = "";
      return;
    }
    find("place").textContent = `x ${length(x * slide.mpp[1])}, y ${length(y * slide.mpp[0])}`;
    this.askValues(y, x);
  }

  async showValues(y, x) {
    const { slide } = this;
    if (!slide?.heat) return;
    this.asked?.abort();
    this.asked = new AbortController();
    try {
      const found = await server.values(slide.key, y, x, this.asked.signal);
      if (this.slide !== slide) return;
      const seen = new Set(this.views.layers.flat().map(({ channel }) => channel));
      const known = slide.channels
        .map(({ label }, i) => ({ label, text: `${label} ${valueText(slide.channels, i, found)}` }))
        .sort((a, b) => seen.has(b.label) - seen.has(a.label))
        .map(({ text }) => text);
      const text = found.explained ? known.join(" · ") : found.tissue ? "tissue, not explained" : "not explained";
      find("values").textContent = found.unreadable ? `${text} · partly unreadable` : text;
      find("values").title = find("values").textContent;
    } catch (error) {
      if (error.name !== "AbortError") find("values").textContent = error.message;
    }
  }

  async clicked(y, x) {
    if (!this.slide.table) return;
    const patch = await server.patchAt(this.slide.key, y, x);
    if (patch.number === null) say("There is no patch here.");
    else this.openPatch(patch);
  }

  async showPatch(number, jumps) {
    const patch = await server.patch(this.slide.key, number);
    this.openPatch(patch);
    if (!jumps) return;
    const [, width] = this.slide.patch.footprint_px;
    const fitting = Math.max(this.slide.mpp[1] / 2, (width * this.slide.mpp[1]) / PATCH_SCREEN_PX);
    const um = Math.min(this.views.pane.place().um, fitting);
    this.views.goTo(this.middle(patch), um);
  }

  openPatch(patch) {
    const { views, slide } = this;
    views.frame([patch.y, patch.x, ...slide.patch.footprint_px]);
    this.panel.show(slide, patch, views.layers[views.active]);
    this.remember();
  }

  /** Mark the patch that is open. */
  markPatch(kind, text = "") {
    const { patch } = this.panel;
    if (!patch || !this.marks.canWrite) return false;
    const [height, width] = this.slide.patch.footprint_px;
    const [top, left, bottom, right] = [patch.y, patch.x, patch.y + height, patch.x + width];
    const outline = [top, left, top, right, bottom, right, bottom, left];
    return this.marks.make({ kind, outline, patch: patch.number, text });
  }

  async showMark(mark) {
    if (mark.patch !== null) {
      await this.showPatch(mark.patch, true);
      return;
    }
    const axis = (first) => mark.outline.filter((_, i) => i % 2 === first);
    const [ys, xs] = [axis(0), axis(1)];
    const span = (values) => [Math.min(...values), Math.max(...values)];
    const [[top, bottom], [left, right]] = [span(ys), span(xs)];
    const screen = this.views.pane.viewer.viewport.getContainerSize();
    const um = 1.3 * this.slide.mpp[1] * Math.max((bottom - top) / screen.y, (right - left) / screen.x);
    this.views.goTo([(top + bottom) / 2, (left + right) / 2], Math.max(um, 0.1));
  }

  closePatch() {
    this.views?.frame(null);
    this.remember();
  }

  async toggleStrip() {
    if (this.strip.isShown || !this.slide) this.strip.hide();
    else await this.strip.show(this.slide);
    find("show-top").setAttribute("aria-pressed", String(this.strip.isShown));
  }

  toggleLayers() {
    const shown = document.body.classList.toggle("no-layers");
    find("show-layers").setAttribute("aria-pressed", String(!shown));
  }

  /** Turn all layers off, or on again as they were. */
  blink() {
    if (!this.views) return;
    const layers = this.views.layers[this.views.active];
    const on = !layers.some((layer) => layer.on);
    this.setLayers(layers.map((layer) => ({ ...layer, on })), true);
  }

  get clusterChannel() {
    return this.slide?.channels.find(isClusters);
  }

  /** Show the clusters of the evidence, and not the maps below them. */
  showClusters() {
    const channel = this.clusterChannel;
    if (!channel) return;
    const layers = this.views.layers[this.views.active];
    const others = layers.filter((layer) => layer.channel !== channel.label).map((layer) => ({ ...layer, on: false }));
    const known = layers.find((layer) => layer.channel === channel.label) || fresh(channel);
    this.setLayers([...others, { ...known, on: true }], true);
  }

  /** Show or hide the clusters of the evidence over all else. */
  toggleClusters() {
    const channel = this.clusterChannel;
    if (!this.views) return;
    if (!channel) {
      say("No clusters of evidence are known on this slide.");
      return;
    }
    const layers = this.views.layers[this.views.active];
    const shown = layers.some((layer) => layer.channel === channel.label);
    if (!shown) this.setLayers([...layers, fresh(channel)], true);
    else this.setLayers(layers.map((layer) => (layer.channel === channel.label ? { ...layer, on: !layer.on } : layer)), true);
  }

  /** Show the next or previous channel in the uppermost layer. */
  nextChannel(step) {
    const layers = this.views?.layers[this.views.active];
    if (!layers?.length) return;
    const { channels } = this.slide;
    const at = channels.findIndex(({ label }) => label === layers.at(-1).channel);
    const next = channels[(at + step + channels.length) % channels.length];
    this.controls.setChannel(layers.length - 1, next.label);
    say(next.label);
  }

  changeOpacity(step) {
    if (!this.views) return;
    const layers = this.views.layers[this.views.active];
    const changed = (value) => Math.round(100 * Math.min(1, Math.max(0, value + step))) / 100;
    this.setLayers(layers.map((layer) => ({ ...layer, opacity: changed(layer.opacity) })), true);
  }

  async nextSlide(step) {
    if (!this.slide) return;
    if (!this.gallery.slides.length) await this.gallery.load();
    const next = this.gallery.beside(this.slide.key, step);
    if (next) this.go(formed({ slide: next.id, views: this.views ? this.views.texts() : [] }));
  }

  /** Show the place at a magnification; a patch that is selected and seen stays in view. */
  setTimes(times) {
    if (!this.views) return;
    const { patch } = this.panel;
    const middle = patch && this.middle(patch);
    const centre = middle && this.views.pane.shows(middle) ? middle : this.views.pane.place().centre;
    this.views.goTo(centre, umAt(times));
  }

  /** The middle (y, x) of a patch. */
  middle(patch) {
    const [height, width] = this.slide.patch.footprint_px;
    return [patch.y + height / 2, patch.x + width / 2];
  }

  /** Keep the view in the address, without a step in the browser's history for each move. */
  writeAddress() {
    const { slide, views } = this;
    if (!slide || !views?.panes.length) return;
    const { centre, um } = views.pane.place();
    const address = formed({ slide: slide.id, centre, um, views: views.texts(), patch: this.panel.patch?.number,
      outlines: this.annotations.text, turn: views.turn });
    history.replaceState(null, "", address);
    this.written = location.hash;
  }

  turnBy(step) {
    if (!this.views) return;
    this.views.turnTo(this.views.turn + step);
    say(`Rotated to ${this.views.turn} degrees`);
    this.remember();
  }

  toggleEvidence() {
    if (find("gallery-evidence").hidden) say("This run has no evidence yet: run wsi-gradcam evidence.");
    else this.go(!this.slide && location.hash === "#evidence" ? "#" : "#evidence");
  }

  buttons() {
    const pressed = (id, action) => find(id).addEventListener("click", action);
    pressed("show-gallery", () => this.go("#"));
    pressed("beside", () => this.toggleBeside());
    pressed("show-layers", () => this.toggleLayers());
    pressed("show-top", () => this.toggleStrip());
    pressed("turn", () => this.turnBy(90));
    pressed("measure", () => this.measure.toggle());
    pressed("save", () => this.views && savePicture(this.views, this.slide.id));
    pressed("dark", toggleDark);
    pressed("gallery-top", () => this.go(this.archiveTop.isShown ? "#" : "#top"));
    pressed("gallery-evidence", () => this.toggleEvidence());
    pressed("help", () => find("help-dialog").showModal());
    const home = element("button", { type: "button", onclick: () => this.views?.pane.home() }, "Fit");
    const times = TIMES.map((value) =>
      element("button", { type: "button", onclick: () => this.setTimes(value) }, magnification(umAt(value))));
    find("magnifications").append(home, ...times);
    if (window.matchMedia("(max-width: 760px)").matches) this.toggleLayers();
  }

  keys() {
    const move = (down, right) => () => this.views?.pane.move(down, right);
    listen([
      [["ArrowUp"], "move up", move(-1, 0)],
      [["ArrowDown"], "move down", move(1, 0)],
      [["ArrowLeft"], "move left", move(0, -1)],
      [["ArrowRight"], "move right", move(0, 1)],
      [["+", "="], "zoom in", () => this.views?.pane.zoomBy(1.5)],
      [["-", "_"], "zoom out", () => this.views?.pane.zoomBy(1 / 1.5)],
      [["0"], "show the whole slide", () => this.views?.pane.home()],
      [["1"], "1×", () => this.setTimes(1)],
      [["2"], "5×", () => this.setTimes(5)],
      [["3"], "10×", () => this.setTimes(10)],
      [["4"], "20×", () => this.setTimes(20)],
      [["5"], "40×", () => this.setTimes(40)],
      [["h"], "hide or show all layers", () => this.blink()],
      [["c"], "next channel", () => this.nextChannel(1)],
      [["C"], "previous channel", () => this.nextChannel(-1)],
      [["["], "less opaque", () => this.changeOpacity(-0.1)],
      [["]"], "more opaque", () => this.changeOpacity(0.1)],
      [["a"], "show or hide annotations", () => this.annotations.toggle()],
      [["k"], "show or hide the clusters of the evidence", () => this.toggleClusters()],
      [["b"], "two views side by side", () => this.toggleBeside()],
      [["l"], "show or hide the layer panel", () => this.toggleLayers()],
      [["t"], "show or hide the top patches", () => this.toggleStrip()],
      [["T"], "the highest patches of all slides", () => this.go(!this.slide && this.archiveTop.isShown ? "#" : "#top")],
      [["E"], "the clusters of the evidence", () => this.toggleEvidence()],
      [["F2"], "name the cluster that is shown", () => this.evidence.editName() || say("No cluster is shown that can be named.")],
      [["r"], "rotate by 90 degrees", () => this.turnBy(90)],
      [["d"], "measure a length", () => this.measure.toggle()],
      [["s"], "save the view as an image", () => this.views && savePicture(this.views, this.slide.id)],
      [["D"], "dark or light page", toggleDark],
      [["n"], "next slide", () => this.nextSlide(1)],
      [["p"], "previous slide", () => this.nextSlide(-1)],
      [["g"], "all slides", () => this.go("#")],
      [["m"], "mark a region: draw around it", () => this.views && this.marks.toggleDrawing()],
      [["Enter"], "while drawing a region: mark the whole view; while measuring: set an end at its centre",
        () => this.marks.takeView() || this.measure.takeMiddle()],
      [["x"], "mark the patch as an artefact", () => this.markPatch("artefact")],
      [["e"], "mark the patch as expected", () => this.markPatch("expected")],
      [["u"], "mark the patch as unexpected", () => this.markPatch("unexpected")],
      [["Escape"], "end drawing or measuring; close the patch", () => this.marks.cancel() || (this.measure.on ? this.measure.toggle() || true : false) || (this.panel.patch && this.panel.close())],
      [["?"], "this help", () => find("help-dialog").showModal()],
    ]);
  }
}

try {
  await new App(await server.run()).start();
} catch (error) {
  find("notice").textContent = `The server does not answer: ${error.message}`;
  find("notice").hidden = false;
  throw error;
}
