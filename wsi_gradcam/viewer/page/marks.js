// Marks: what people say of patches and regions; drawn over each view, listed, made and taken back.

import { element, say } from "./dom.js";
import { pathOf, strokeOutline } from "./overlay.js";
import * as server from "./server.js";

export const KINDS = {
  artefact: ["Artefact", "#ffb000", "x"], expected: ["Expected", "#4de2a0", "e"],
  unexpected: ["Unexpected", "#ff9ad5", "u"], note: ["Note", "#ffffff", ""],
};
const AGAIN = 10000; // ms until others' marks are asked for
const LEAST_PX = 4; // on the screen, between points of an outline
const MOST_POINTS = 2000;

export class Marks {
  /** `changed()` is told when the list has changed, `goTo(mark)` of a mark that is to be seen. */
  constructor(events) {
    this.events = events;
    this.drafts = {}; // words that are being written, by field: panels are built anew
    this.clear();
    setInterval(() => { if (!document.hidden && this.views) this.load(); }, AGAIN);
  }

  clear() {
    this.stopDrawing();
    this.list = [];
    this.canWrite = false;
    this.views = null;
    this.slide = null;
  }

  async show(slide, views) {
    this.clear();
    this.slide = slide;
    this.views = views;
    await this.load();
  }

  async load() {
    const { slide } = this;
    let found;
    try {
      found = await server.marks(slide.key);
    } catch {
      return; // asked for again soon
    }
    if (this.slide !== slide) return;
    const known = JSON.stringify([found.marks.map(({ id }) => id), found.can_write]);
    if (known === this.known && this.list.length === found.marks.length && this.canWrite === found.can_write) return;
    this.known = known;
    this.list = found.marks;
    this.canWrite = found.can_write;
    this.draw();
    this.events.changed();
  }

  draw() {
    const paths = this.list.map((mark) => [pathOf([mark.outline]), KINDS[mark.kind][1]]);
    const paint = (context, view) => paths.forEach(([path, colour]) => {
      context.setLineDash([6 / view.screenPx, 3 / view.screenPx]);
      strokeOutline(context, view, path, colour, 2);
    });
    this.views?.paint("marks", paths.length ? paint : null);
  }

  get name() {
    return localStorage.getItem("wsi-gradcam-name") || "";
  }

  /** Keep a mark of a patch or a region: kind, outline (flat y, x), patch number, text. */
  async make({ kind, outline, patch = null, text = "" }) {
    const pairs = Array.from({ length: outline.length / 2 }, (_, i) => [outline[2 * i], outline[2 * i + 1]]);
    const { slide } = this;
    try {
      const made = await server.mark({ slide: slide.key, kind, outline: pairs, patch, text, by: this.name });
      say(`Marked: ${KINDS[kind][0]}`);
      if (this.slide !== slide) return true;
      this.list = [...this.list, made];
      this.draw();
      this.events.changed();
      return true;
    } catch (error) {
      this.problem = error.message;
      say(error.message);
      this.events.changed();
      this.problem = null;
      return false;
    }
  }

  async remove(mark) {
    try {
      await server.mark({ delete: mark.id, by: this.name });
    } catch (error) {
      say(error.message);
      return;
    }
    this.list = this.list.filter(({ id }) => id !== mark.id);
    this.draw();
    this.events.changed();
    document.getElementById("mark-region")?.focus();
  }

  /** Buttons that mark with a kind, and a field for words: `send(kind, text)`. */
  form(send, id) {
    const text = element("input", {
      type: "text", maxlength: "2000", id: `${id}-text`, autocomplete: "off", value: this.drafts[id] || "",
      oninput: () => { this.drafts[id] = text.value; },
    });
    const button = (kind) => {
      const [label, colour, key] = KINDS[kind];
      const swatch = element("span", { class: "swatch" });
      swatch.style.backgroundColor = colour;
      return element("button", {
        type: "button", "data-kind": kind, title: key && id === "patch-mark" ? `Key ${key}` : null,
        onclick: async () => {
          if (kind === "note" && !text.value.trim()) {
            text.focus();
            say("Write the note first.");
          } else if (await send(kind, text.value)) {
            text.value = "";
            delete this.drafts[id];
          }
        },
      }, swatch, label);
    };
    return element("div", { class: "mark-form", role: "group", "aria-label": "Mark" },
      element("label", { class: "mark-text" }, "Comment ", text),
      element("div", { class: "mark-kinds" }, ...Object.keys(KINDS).map(button)));
  }

  /** The section of the layer panel; null where nothing can be marked and nothing is. */
  section() {
    if (!this.slide || !(this.canWrite || this.list.length)) return null;
    const name = element("input", {
      type: "text", value: this.name, maxlength: "100", autocomplete: "name", id: "mark-name",
      onchange: (event) => localStorage.setItem("wsi-gradcam-name", event.target.value),
    });
    return element("section", { id: "marks", "aria-labelledby": "marks-title" },
      element("h2", { id: "marks-title" }, `Marks${this.list.length ? ` (${this.list.length})` : ""}`),
      this.problem ? element("p", { class: "error" }, this.problem) : null,
      this.drawn ? this.drawnForm() : this.canWrite ? this.begin() : null,
      element("ul", { class: "mark-list" }, ...this.list.map((mark) => this.item(mark)).reverse()),
      this.canWrite ? element("label", { class: "row" }, element("span", {}, "Your name"), name) : null);
  }

  begin() {
    return element("div", {},
      element("button", {
        type: "button", id: "mark-region", "aria-pressed": String(Boolean(this.drawing)), title: "Key m",
        onclick: () => this.toggleDrawing(),
      }, "Mark a region"),
      this.drawing ? element("p", { class: "facts" },
        "Draw around it with the mouse. Enter marks the whole view, Esc cancels.") : null);
  }

  drawnForm() {
    return element("div", { id: "region-form" },
      element("p", {}, "What is in this region?"),
      this.form(async (kind, text) => {
        const { drawn } = this;
        const kept = await this.make({ kind, outline: drawn, text });
        if (kept) this.stopDrawing();
        this.events.changed();
        return kept;
      }, "region-mark"),
      element("button", { type: "button", onclick: () => { this.stopDrawing(); this.events.changed(); } }, "Cancel"));
  }

  item(mark) {
    const [label, colour] = KINDS[mark.kind];
    const swatch = element("span", { class: "swatch" });
    swatch.style.backgroundColor = colour;
    const what = mark.patch === null ? "region" : `patch ${mark.patch}`;
    const about = [what, mark.by, mark.made.slice(0, 10)].filter(Boolean).join(" · ");
    return element("li", {},
      element("button", { type: "button", class: "mark-go", onclick: () => this.events.goTo(mark) }, swatch,
        element("span", {}, element("strong", {}, mark.text || label),
          element("span", { class: "facts" }, `${mark.text ? `${label} · ` : ""}${about}`))),
      this.canWrite ? element("button", {
        type: "button", class: "small", "aria-label": `Remove mark: ${mark.text || label}, ${what}`, title: "Remove mark",
        onclick: () => this.remove(mark),
      }, "✕") : null);
  }

  toggleDrawing() {
    if (!this.canWrite) {
      say("Marks cannot be saved here.");
      return;
    }
    if (this.drawing || this.drawn) this.stopDrawing();
    else this.startDrawing();
    this.events.changed();
  }

  startDrawing() {
    this.drawing = true;
    document.body.classList.add("drawing");
    this.undo = this.views.panes.map((pane) => this.listen(pane));
    say("Draw around a region with the mouse, or press Enter to mark the whole view.");
  }

  stopDrawing() {
    this.undo?.forEach((stop) => stop());
    this.undo = null;
    this.drawing = false;
    this.drawn = null;
    document.body.classList.remove("drawing");
    this.views?.paint("drawing", null);
  }

  /** Take what a drag over a view encloses. */
  listen(pane) {
    const { canvas } = pane.viewer;
    pane.viewer.setMouseNavEnabled(false);
    let line = null;
    let last = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      const at = new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top);
      return [at, pane.position(at).map((value) => Math.round(value * 10) / 10)];
    };
    const down = (event) => {
      const [at, point] = place(event);
      line = [...point];
      last = at;
    };
    const move = (event) => {
      if (!line) return;
      const [at, point] = place(event);
      if (at.distanceTo(last) < LEAST_PX || line.length >= 2 * MOST_POINTS) return;
      line.push(...point);
      last = at;
      this.paintDrawn(line);
    };
    const up = () => {
      if (line && line.length >= 6) this.take(line);
      line = null;
    };
    const events = [[canvas, "pointerdown", down], [document, "pointermove", move], [document, "pointerup", up]];
    events.forEach(([target, name, action]) => target.addEventListener(name, action));
    return () => {
      events.forEach(([target, name, action]) => target.removeEventListener(name, action));
      if (pane.viewer.world) pane.viewer.setMouseNavEnabled(true);
    };
  }

  paintDrawn(line) {
    const path = pathOf([line]);
    this.views.paint("drawing", (context, view) => strokeOutline(context, view, path, "#00c2ff", 2.5));
  }

  /** Ask what is in an outline. */
  take(line) {
    this.stopDrawing();
    this.drawn = line;
    this.paintDrawn(line);
    this.events.changed();
    document.querySelector("#region-mark-text")?.focus();
  }

  /** The keyboard's way: what the view shows. */
  takeView() {
    if (!this.drawing) return false;
    const { pane } = this.views;
    const { x: width, y: height } = pane.viewer.viewport.getContainerSize();
    const corners = [[0, 0], [width, 0], [width, height], [0, height]];
    const [most, wide] = this.slide.size_px;
    const inside = (value, limit) => Math.round(10 * Math.min(limit, Math.max(0, value))) / 10;
    this.take(corners.flatMap(([x, y]) => {
      const [down, across] = pane.position(new OpenSeadragon.Point(x, y));
      return [inside(down, most), inside(across, wide)];
    }));
    return true;
  }

  /** End drawing; false where there was none. */
  cancel() {
    if (!this.drawing && !this.drawn) return false;
    this.stopDrawing();
    this.events.changed();
    return true;
  }
}
