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
    const view = { screenPx: pane.screenPx(), ratio, transform: this.transform(ratio), box: this.box(width, height) };
    for (const painter of this.painters.values()) {
      context.save();
      context.setTransform(...view.transform);
      painter(context, view);
      context.restore();
    }
  }

  /** What the view shows: top, left, bottom, right in level-0 px. */
  box(width, height) {
    const corners = [[0, 0], [width, 0], [0, height], [width, height]].map(([x, y]) =>
      this.pane.position(new OpenSeadragon.Point(x, y)));
    const [ys, xs] = [0, 1].map((axis) => corners.map((corner) => corner[axis]));
    return [Math.min(...ys), Math.min(...xs), Math.max(...ys), Math.max(...xs)];
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

const FEW = 4000; // points, which are drawn as they are

/**
 * Outlines, flat lists y, x, y, x, ..., of which each view draws what it shows, no finer than it shows it: many thousand
 * points cost no more than those that are seen apart.
 */
export class Outlines {
  constructor(lines) {
    this.count = lines.reduce((sum, line) => sum + line.length / 2, 0);
    this.levels = [lines];
    this.boxes = lines.map(boxOf);
    this.whole = this.count <= FEW ? pathOf(lines) : null;
  }

  path({ screenPx, box: [top, left, bottom, right] }) {
    if (this.whole) return this.whole;
    const lines = this.at(Math.max(0, Math.floor(-Math.log2(screenPx))));
    return pathOf(lines.filter((line, i) => {
      const [y0, x0, y1, x1] = this.boxes[i];
      return line.length && y0 <= bottom && y1 >= top && x0 <= right && x1 >= left;
    }));
  }

  /** The lines without points that lie within 2 ** level px of the one before. */
  at(level) {
    this.levels[level] ||= this.levels[0].map((line) => thinned(line, 2 ** level));
    return this.levels[level];
  }
}

function boxOf(line) {
  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < line.length; i += 1) {
    const axis = i % 2;
    box[axis] = Math.min(box[axis], line[i]);
    box[2 + axis] = Math.max(box[2 + axis], line[i]);
  }
  return box;
}

/** A line without points that lie within `least` of the last one that was kept; three are kept of each. */
function thinned(line, least) {
  const made = [line[0], line[1]];
  const spare = line.length - 4;
  for (let i = 2; i < line.length; i += 2) {
    const far = Math.hypot(line[i] - made.at(-2), line[i + 1] - made.at(-1)) >= least;
    if (far || (i >= spare && made.length < 6)) made.push(line[i], line[i + 1]);
  }
  return made;
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
