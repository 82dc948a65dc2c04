// The one or two views of a slide: what each shows, and that both show the same place.

import { find } from "./dom.js";
import { firstChannel, fresh, read, written } from "./layers.js";
import { showLegend } from "./legend.js";
import { Pane } from "./pane.js";

export class Views {
  /** `events` as a pane's, and moved() once for all of them. */
  constructor(slide, classes, events) {
    this.slide = slide;
    this.classes = classes;
    this.events = events;
    this.panes = [];
    this.layers = [];
    this.active = 0;
    this.smooth = true;
    this.framed = null;
    this.painters = new Map();
    this.turn = 0; // degrees, clockwise
  }

  /** Show lists of layers as texts, one a view; without any, the first channel. */
  async open(texts) {
    const { channels } = this.slide;
    const known = this.known(texts);
    const first = known[0] || (channels.length ? [fresh(firstChannel(channels, this.classes))] : []);
    await this.add(first);
    const second = !texts.length && first.length && channels.find((channel) => channel.second === first[0].channel);
    if (known[1] || second) await this.add(known[1] || [fresh(second)]);
  }

  /** Show other lists of layers, as many as there are views. */
  async setTexts(texts) {
    this.layers = this.known(texts);
    await Promise.all(this.panes.map((_, number) => this.draw(number)));
  }

  known(texts) {
    return texts.map((list) => list.map((text) => read(text, this.slide.channels)).filter(Boolean));
  }

  async add(layers) {
    const label = this.panes.length ? "right view" : "slide";
    const pane = new Pane(find("views"), this.slide, label, {
      ...this.events,
      moved: () => this.moved(),
      led: (leader) => this.led(leader),
    });
    this.panes.push(pane);
    this.layers.push(layers);
    find("views").classList.toggle("two", this.panes.length > 1);
    await pane.open();
    if (!this.panes.includes(pane)) return; // closed meanwhile
    pane.turn(this.turn);
    pane.frame(this.framed);
    this.painters.forEach((painter, name) => pane.overlay.set(name, painter));
    this.moved();
    await this.draw(this.panes.indexOf(pane));
  }

  /** A second view of the place, of the next channel; or no second view. */
  async toggleBeside() {
    if (this.panes.length > 1) {
      this.panes.pop().close();
      this.layers.pop();
      find("views").classList.remove("two");
      this.led(this.panes[0]);
      return;
    }
    const { channels } = this.slide;
    const shown = this.layers[0].map(({ channel }) => channel);
    const other = channels.find(({ label }) => !shown.includes(label)) || channels[0];
    const { centre, um } = this.panes[0].place();
    await this.add(other ? [fresh(other)] : []);
    this.leader = this.panes[0];
    // Both are narrower now: the same place at the same magnification.
    requestAnimationFrame(() => requestAnimationFrame(() => this.goTo(centre, um, true)));
  }

  setLayers(layers) {
    this.layers[this.active] = layers;
    return this.draw(this.active);
  }

  setSmooth(smooth) {
    this.smooth = smooth;
    this.panes.forEach((pane) => pane.setSmooth(smooth));
  }

  draw(number) {
    const pane = this.panes[number];
    showLegend(pane, this.layers[number]);
    const drawn = pane.setLayers(this.layers[number]);
    pane.setSmooth(this.smooth);
    return drawn;
  }

  led(pane) {
    this.leader = pane;
    const number = this.panes.indexOf(pane);
    if (number >= 0 && number !== this.active) {
      this.active = number;
      this.events.activated();
    }
  }

  /** Let all views show what the one shows that leads, whichever has moved: one that opened or got another size, too. */
  moved() {
    const { pane: leader } = this;
    const ready = (pane) => pane.viewer.world?.getItemCount();
    if (this.panes.length < 2 || !this.panes.every(ready)) return;
    this.panes.filter((other) => other !== leader).forEach((other) => other.follow(leader));
  }

  get pane() {
    return this.leader && this.panes.includes(this.leader) ? this.leader : this.panes[0];
  }

  goTo(centre, um, immediately) {
    this.pane.goTo(centre, um, immediately);
  }

  frame(rectangle) {
    this.framed = rectangle;
    this.panes.forEach((pane) => pane.frame(rectangle));
  }

  /** Draw over all views, also those to come; see `Overlay`. */
  paint(name, painter) {
    if (painter) this.painters.set(name, painter);
    else this.painters.delete(name);
    this.panes.forEach((pane) => pane.overlay.set(name, painter));
  }

  /** Turn all views. */
  turnTo(degrees) {
    this.turn = ((degrees % 360) + 360) % 360;
    this.panes.forEach((pane) => pane.turn(this.turn));
  }

  texts() {
    return this.layers.map((layers) => layers.map(written));
  }

  close() {
    this.panes.forEach((pane) => pane.close());
    this.panes = [];
  }
}
