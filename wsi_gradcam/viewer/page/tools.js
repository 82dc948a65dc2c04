// Tools of the view: turning it, measuring a length, saving it as a picture, and the dark page.

import { classColour, colours, gradientStops } from "./colours.js";
import { element, find, length, say } from "./dom.js";
import { pathOf, strokeOutline } from "./overlay.js";

const DARK = "wsi-gradcam-dark";

/** Show the page dark or light, as it was left, or as the system is. */
export function startDark() {
  const kept = localStorage.getItem(DARK);
  setDark(kept === null ? window.matchMedia("(prefers-color-scheme: dark)").matches : kept === "yes");
}

export function toggleDark() {
  const dark = !document.documentElement.classList.contains("dark");
  localStorage.setItem(DARK, dark ? "yes" : "no");
  setDark(dark);
}

function setDark(dark) {
  document.documentElement.classList.toggle("dark", dark);
  find("dark").setAttribute("aria-pressed", String(dark));
}

/** Measures a length: a drag over a view, or Enter at both ends, which lie in the middle of the view. */
export class Measure {
  constructor(app) {
    this.app = app;
    this.on = false;
  }

  toggle() {
    if (this.on) this.stop();
    else if (this.app.views) this.start();
    find("measure").setAttribute("aria-pressed", String(this.on));
  }

  start() {
    const { views } = this.app;
    this.on = true;
    this.views = views;
    this.first = null;
    document.body.classList.add("drawing");
    this.undo = views.panes.map((pane) => this.listen(pane));
    this.paint();
    say("Drag from one end to the other. Or centre the view on one end and press Enter, then do the same with the other.");
  }

  stop() {
    this.undo?.forEach((undo) => undo());
    this.undo = null;
    this.on = false;
    this.line = null;
    document.body.classList.remove("drawing");
    this.views?.paint("measure", null);
    find("measure").setAttribute("aria-pressed", "false");
  }

  listen(pane) {
    const { canvas } = pane.viewer;
    pane.viewer.setMouseNavEnabled(false);
    let from = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return pane.position(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    };
    const down = (event) => { from = place(event); };
    const move = (event) => { if (from) this.show([...from, ...place(event)]); };
    const up = () => { from = null; };
    const events = [[canvas, "pointerdown", down], [document, "pointermove", move], [document, "pointerup", up]];
    events.forEach(([target, name, action]) => target.addEventListener(name, action));
    return () => {
      events.forEach(([target, name, action]) => target.removeEventListener(name, action));
      if (pane.viewer.world) pane.viewer.setMouseNavEnabled(true);
    };
  }

  /** The keyboard's way; false where nothing is measured. */
  takeMiddle() {
    if (!this.on) return false;
    const { centre } = this.views.pane.place();
    if (this.first) {
      this.show([...this.first, ...centre]);
      this.first = null;
    } else {
      this.first = centre;
      this.show([...centre, ...centre]);
    }
    return true;
  }

  show(line) {
    this.line = line;
    const { mpp } = this.app.slide;
    this.text = length(Math.hypot((line[2] - line[0]) * mpp[0], (line[3] - line[1]) * mpp[1]));
    say(this.text);
    this.paint();
  }

  paint() {
    const { line, text } = this;
    this.views.paint("measure", (context, view) => {
      if (!line) return;
      strokeOutline(context, view, pathOf([line], false), "#ffe14d", 2.5);
      const size = 15 / view.screenPx;
      context.translate((line[1] + line[3]) / 2, (line[0] + line[2]) / 2);
      context.rotate((-this.app.views.turn * Math.PI) / 180);
      context.font = `600 ${size}px system-ui, sans-serif`;
      context.lineWidth = 4 / view.screenPx;
      context.strokeStyle = "#000";
      context.fillStyle = "#ffe14d";
      context.strokeText(text, size / 2, -size / 2);
      context.fillText(text, size / 2, -size / 2);
    });
  }
}

/** Save what the views show, with scale bars and colour bars, as a PNG. */
export async function savePicture(views, name) {
  const ratio = window.devicePixelRatio || 1;
  const boxes = views.panes.map((pane) => pane.element.getBoundingClientRect());
  const [left, top] = [Math.min(...boxes.map((box) => box.left)), Math.min(...boxes.map((box) => box.top))];
  const width = Math.max(...boxes.map((box) => box.right)) - left;
  const height = Math.max(...boxes.map((box) => box.bottom)) - top;
  const canvas = element("canvas", { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  views.panes.forEach((pane, i) => {
    const box = boxes[i];
    context.save();
    context.translate(box.left - left, box.top - top);
    context.beginPath();
    context.rect(0, 0, box.width, box.height);
    context.clip();
    for (const source of [pane.viewer.drawer.canvas, pane.overlay.canvas]) {
      context.drawImage(source, 0, 0, box.width, box.height);
    }
    drawRuler(context, pane, box);
    drawBars(context, pane, views.layers[i], box);
    context.restore();
  });
  const picture = await new Promise((done) => { canvas.toBlob(done, "image/png"); });
  const link = element("a", { href: URL.createObjectURL(picture), download: `${name.replace(/[^\w.-]+/g, "_")}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say("The image is saved.");
}

function panel(context, x, y, width, height) {
  context.fillStyle = "rgb(255 255 255 / .9)";
  context.fillRect(x, y, width, height);
  context.fillStyle = "#111";
  context.font = "12px system-ui, sans-serif";
}

function drawRuler(context, pane, box) {
  const wide = parseFloat(pane.ruler.bar.style.width);
  panel(context, 10, box.height - 46, wide + 16, 36);
  context.fillRect(18, box.height - 38, wide, 3);
  context.fillText(pane.ruler.text.textContent.split(" · ")[0], 18, box.height - 18);
}

/** The colour bars, as they are seen over a pale tissue. */
function drawBars(context, pane, layers, box) {
  const titles = [...pane.legend.querySelectorAll(".bar-title:first-child")].map((title) => title.textContent);
  const shown = layers.filter(({ on }) => on).map((layer, i) => [layer, titles[i] || layer.channel, pane.channel(layer)]);
  let y = box.height - 10;
  for (const [layer, title, channel] of shown.reverse()) {
    if (channel.classes) {
      y = drawClasses(context, layer, title, channel, box, y);
      continue;
    }
    y -= 44;
    panel(context, box.width - 236, y, 226, 42);
    context.fillText(title, box.width - 228, y + 15, 210);
    const fill = context.createLinearGradient(box.width - 228, 0, box.width - 18, 0);
    gradientStops(layer, colours(layer.map)).forEach(([at, colour]) => fill.addColorStop(at, colour));
    context.fillStyle = "#b9a9b6";
    context.fillRect(box.width - 228, y + 20, 210, 8);
    context.fillStyle = fill;
    context.fillRect(box.width - 228, y + 20, 210, 8);
    context.fillStyle = "#111";
    const [low, high] = layer.window.map((value) => String(Number(value.toPrecision(3))));
    context.fillText(low, box.width - 228, y + 39);
    context.fillText(high, box.width - 18 - context.measureText(high).width, y + 39);
  }
}

/** Classes with their colours above `bottom`, a line each; where the next one ends. */
function drawClasses(context, layer, title, channel, box, bottom) {
  const names = channel.classes.map((name, number) => [name, number]).filter(([, number]) => !layer.hidden.includes(number));
  const top = bottom - 24 - 17 * names.length;
  panel(context, box.width - 236, top, 226, bottom - top - 2);
  context.fillText(title, box.width - 228, top + 15, 210);
  names.forEach(([name, number], i) => {
    const y = top + 22 + 17 * i;
    context.fillStyle = channel.colours?.[number] ?? classColour(number);
    context.fillRect(box.width - 228, y, 12, 12);
    context.strokeStyle = "#333";
    context.strokeRect(box.width - 228, y, 12, 12);
    context.fillStyle = "#111";
    context.fillText(name, box.width - 210, y + 11, 192);
  });
  return top;
}
