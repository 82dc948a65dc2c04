// What is drawn over a view: outlines and marks, on a canvas that follows the slide. Positions are (y, x) in level-0 px.

import { element } from "./dom.js";

export class Overlay {
  /** `painters`: functions of (context, view), from below to above; `view` has `screenPx` and `transform`. */
  constructor(pane) {
    this.pane = pane;
    this.painters = new Map();
    this.canvas = element("canvas", { class: "overlay", "aria-hidden": "true" });
    pane.viewer.canvas.append(this.canvas); // below the navigator
    const { viewer } = pane;
    for (const name of ["update-viewport", "resize", "open"]) viewer.addHandler(name, () => this.draw());
  }

  /** Draw with `painter` too, under a name that it can be replaced by; null draws nothing any more. */
  set(name, painter) {
    if (painter) this.painters.set(name, painter);
    else this.painters.delete(name);
    this.draw();
  }

  draw() {
    const { canvas, pane } = this;
    if (!pane.viewer.viewport || !pane.viewer.world?.getItemCount()) return;
    const ratio = window.devicePixelRatio || 1;
    const { x: width, y: height } = pane.viewer.viewport.getContainerSize();
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== across || canvas.height !== down) Object.assign(canvas, { width: across, height: down });
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, across, down);
    if (!this.painters.size) return;
    const view = { screenPx: pane.screenPx(), ratio, transform: this.transform(ratio) };
    for (const painter of this.painters.values()) {
      context.save();
      context.setTransform(...view.transform);
      painter(context, view);
      context.restore();
    }
  }

  /** From level-0 px (x, y) to pixels of the canvas: a, b, c, d, e, f. */
  transform(ratio) {
    const [corner, right, below] = [[0, 0], [0, 1000], [1000, 0]].map((place) => this.pane.onScreen(place));
    const step = (to, axis) => ((to[axis] - corner[axis]) / 1000) * ratio;
    return [step(right, "x"), step(right, "y"), step(below, "x"), step(below, "y"), corner.x * ratio, corner.y * ratio];
  }
}

/** A path of flat lists y, x, y, x, ... each closed, or open for a line. */
export function pathOf(lines, closed = true) {
  const path = new Path2D();
  for (const line of lines) {
    for (let i = 0; i < line.length; i += 2) {
      if (i) path.lineTo(line[i + 1], line[i]);
      else path.moveTo(line[1], line[0]);
    }
    if (closed) path.closePath();
  }
  return path;
}

/** Stroke a path with a dark edge, so that it is seen on glass, tissue and colours; `width` in CSS px. */
export function strokeOutline(context, { screenPx }, path, colour, width = 1.6) {
  context.lineJoin = "round";
  for (const [style, wide] of [["rgb(0 0 0 / .75)", width + 1.8], [colour, width]]) {
    context.strokeStyle = style;
    context.lineWidth = wide / screenPx;
    context.stroke(path);
  }
}
