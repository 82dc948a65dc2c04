// Scale bar and magnification of a view.

import { element, length } from "./dom.js";

const LONGEST_PX = 140;
const UM_AT_1X = 10; // by the microscope's convention: 20x is 0.5 µm per pixel

export class Ruler {
  constructor(parent, mpp) {
    this.mpp = mpp;
    this.bar = element("span", { class: "ruler-bar" });
    this.text = element("span", { class: "ruler-text" });
    parent.append(element("div", { class: "ruler" }, this.bar, this.text));
  }

  /** Fit to a zoom, in CSS pixels per level-0 pixel. */
  show(screenPx) {
    const um = this.mpp[1] / screenPx;
    const long = roundLength(LONGEST_PX * um);
    this.bar.style.width = `${long / um}px`;
    this.text.textContent = `${length(long)} · ${magnification(um)}`;
  }
}

/** The largest 1, 2 or 5 times a power of ten that is not longer. */
export function roundLength(um) {
  const power = 10 ** Math.floor(Math.log10(um));
  return [5, 2, 1].find((step) => step * power <= um * (1 + 1e-9)) * power;
}

export function magnification(um) {
  return `${Number((UM_AT_1X / um).toPrecision(2))}×`;
}

/** Micrometres per CSS pixel at a magnification. */
export const umAt = (times) => UM_AT_1X / times;
