// One view: the slide in deep zoom with layers over it. Positions are (y, x) in level-0 px of the slide.

import { drawLines, lineSteps, recolour, table } from "./colours.js";
import { element } from "./dom.js";
import { Overlay } from "./overlay.js";
import { pyramid } from "./pyramid.js";
import { Ruler } from "./ruler.js";
import { heatTile, slideTile } from "./server.js";

const MOST_SCREEN_PX = 8; // per level-0 pixel
let names = 0;

export class Pane {
  /** `events`: moved(pane), pointed(y, x), clicked(y, x), led(pane). */
  constructor(parent, slide, label, events) {
    this.slide = slide;
    this.element = element("div", { class: "pane" });
    this.screen = element("div", { class: "screen" });
    this.element.append(this.screen);
    parent.append(this.element); // before the viewer is made: it measures itself
    this.layers = [];
    this.smooth = true;
    this.shown = []; // a tiled image a layer, or a promise of it
    this.viewer = OpenSeadragon({ ...SETTINGS, element: this.screen });
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.canvas.setAttribute("aria-label", `${label}: arrow keys move, + and − zoom, 0 shows all`);
    this.ruler = new Ruler(this.element, slide.mpp);
    this.overlay = new Overlay(this);
    this.listen(events);
  }

  /** Show the slide; settles when it can be moved. */
  async open() {
    const { slide } = this;
    const [height, width] = slide.size_px;
    if (slide.slide.levels) {
      const picture = slide.slide;
      const url = (level, row, column) => slideTile(slide, level, row, column);
      await this.add({ height, width, levels: picture.levels, tilePx: picture.tile_px, url }, 1);
    } else if (slide.heat) {
      await this.addHeat(slide.channels[0], 0); // unseen: it gives the view its size
    }
  }

  add(settings, width, more = {}) {
    names += 1;
    const source = pyramid({ ...settings, name: String(names) });
    return new Promise((resolve, reject) => {
      this.viewer.addTiledImage({
        tileSource: source, x: 0, y: 0, width, ...more,
        success: ({ item }) => {
          item.addHandler("fully-loaded-change", () => this.showLoading());
          item.addHandler("opacity-change", () => this.showLoading());
          this.showLoading();
          resolve(item);
        },
        error: ({ message }) => reject(new Error(message)),
      });
    });
  }

  /** Say whether tiles are still to come. */
  showLoading() {
    const { world } = this.viewer;
    const items = Array.from({ length: world?.getItemCount() || 0 }, (_, i) => world.getItemAt(i));
    const loading = items.some((item) => item.getOpacity() > 0 && !item.getFullyLoaded());
    this.element.classList.toggle("loading", loading);
  }

  addHeat(channel, opacity) {
    const { size_px: size } = this.slide;
    const heat = channel.heat || this.slide.heat; // a second run may have another grid
    const [height, width] = heat.size_px;
    const { smooth } = this;
    const url = (level, row, column) => heatTile(this.slide, channel, level, row, column, smooth);
    return this.add({ height, width, levels: heat.levels, tilePx: heat.tile_px, url }, width / size[1], { opacity });
  }

  /** Show these layers, from below to above. Changed settings alone need no request. */
  async setLayers(layers, anew = false) {
    const before = this.layers;
    this.layers = layers;
    const old = this.shown;
    this.shown = layers.map((layer, i) => {
      const same = !anew && before[i] && before[i].channel === layer.channel && old[i];
      return same ? old[i] : this.addHeat(this.channel(layer), 0);
    });
    old.forEach((item, i) => {
      if (this.shown[i] !== item) Promise.resolve(item).then((found) => this.viewer.world.removeItem(found));
    });
    const [items, wanted] = [await Promise.all(this.shown), this.shown];
    if (this.shown !== wanted || !this.viewer.world) return; // set anew meanwhile
    this.shown = items;
    items.forEach((item, i) => this.paint(item, layers[i], before[i]));
  }

  paint(item, layer, before) {
    const known = JSON.stringify({ ...layer, on: 0, opacity: 0 });
    if (item.layerKey !== known) {
      item.layerKey = known;
      const channel = this.channel(layer);
      item.source.lookup = table(layer, channel);
      item.source.lines = lineSteps(layer, channel.scale);
      item.source.filled = !item.source.lines.length || !layer.lines.endsWith("alone");
      item.requestInvalidate();
      this.viewer.navigator?.world.requestInvalidate();
    }
    item.setOpacity(layer.on ? layer.opacity : 0);
  }

  channel(layer) {
    return this.slide.channels.find(({ label }) => label === layer.channel);
  }

  /** Where the view is: centre (y, x), and micrometres per CSS pixel. */
  place() {
    const centre = this.viewer.viewport.getCenter(true);
    const width = this.slide.size_px[1];
    return { centre: [centre.y * width, centre.x * width], um: this.slide.mpp[1] / this.screenPx() };
  }

  /** CSS pixels per level-0 pixel. */
  screenPx() {
    return (this.viewer.viewport.getZoom(true) * this.viewer.viewport.getContainerSize().x) / this.slide.size_px[1];
  }

  goTo([y, x], um, immediately = false) {
    const { viewport } = this.viewer;
    const width = this.slide.size_px[1];
    if (um) {
      const zoom = ((this.slide.mpp[1] / um) * width) / viewport.getContainerSize().x;
      viewport.zoomTo(zoom, undefined, immediately);
    }
    viewport.panTo(new OpenSeadragon.Point(x / width, y / width), immediately);
    viewport.applyConstraints(immediately);
  }

  home(immediately = false) {
    this.viewer.viewport.goHome(immediately);
  }

  /** Whether a place (y, x) is seen. */
  shows([y, x]) {
    const { centre } = this.place();
    const { x: width, y: height } = this.viewer.viewport.getContainerSize();
    const px = this.screenPx();
    return Math.abs(y - centre[0]) * px <= height / 2 && Math.abs(x - centre[1]) * px <= width / 2;
  }

  /** Show what another view of the same slide shows, unless it is shown already. */
  follow(other) {
    const [here, there] = [this.place(), other.place()];
    const far = Math.max(...there.centre.map((value, i) => Math.abs(value - here.centre[i]))) * this.screenPx();
    if (far < 0.01 && Math.abs(here.um / there.um - 1) < 1e-6) return;
    const { viewport } = this.viewer;
    const width = this.slide.size_px[1];
    viewport.zoomTo((other.screenPx() * width) / viewport.getContainerSize().x, undefined, true);
    viewport.panTo(new OpenSeadragon.Point(there.centre[1] / width, there.centre[0] / width), true);
  }

  move(down, right) {
    const size = this.viewer.viewport.getContainerSize();
    const delta = new OpenSeadragon.Point(right * size.x * 0.2, down * size.y * 0.2);
    this.viewer.viewport.panBy(this.viewer.viewport.deltaPointsFromPixels(delta));
    this.viewer.viewport.applyConstraints();
  }

  /** Turn the view to 0, 90, 180 or 270 degrees, clockwise. */
  turn(degrees) {
    this.viewer.viewport.setRotation(degrees, true);
    this.overlay.draw();
  }

  zoomBy(factor) {
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  /** Frame a rectangle of the slide, or none. */
  frame(rectangle) {
    this.viewer.removeOverlay(this.framed);
    if (!rectangle) return;
    const width = this.slide.size_px[1];
    const [y, x, height, across] = rectangle.map((value) => value / width);
    this.framed = element("div", { class: "frame" });
    this.viewer.addOverlay({ element: this.framed, location: new OpenSeadragon.Rect(x, y, across, height) });
  }

  /** Interpolate between the heatmap's pixels, or show each as it is. */
  setSmooth(smooth) {
    if (smooth === this.smooth) return;
    this.smooth = smooth;
    this.setLayers(this.layers, true);
  }

  /** Where a place (y, x) is on the screen, CSS px from the corner of the view. */
  onScreen([y, x]) {
    const width = this.slide.size_px[1];
    return this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(x / width, y / width), true);
  }

  position(webPoint) {
    const point = this.viewer.viewport.pointFromPixel(webPoint, true);
    const width = this.slide.size_px[1];
    return [point.y * width, point.x * width];
  }

  listen(events) {
    const { viewer } = this;
    viewer.addHandler("tile-invalidated", colour);
    viewer.addHandler("canvas-key", (event) => {
      event.preventDefaultAction = true; // keys.js hears them
    });
    viewer.addHandler("canvas-click", (event) => {
      if (event.quick) events.clicked(...this.position(event.position));
    });
    for (const name of ["canvas-press", "canvas-scroll", "canvas-pinch", "canvas-enter"]) {
      viewer.addHandler(name, () => events.led(this));
    }
    viewer.addHandler("viewport-change", () => {
      this.ruler.show(this.screenPx());
      events.moved(this);
    });
    viewer.addHandler("resize", () => requestAnimationFrame(() => viewer.world && events.moved(this)));
    viewer.addHandler("animation-finish", () => events.rested(this));
    new OpenSeadragon.MouseTracker({
      element: viewer.canvas,
      moveHandler: (event) => events.pointed(...this.position(event.position)),
    });
  }

  close() {
    this.viewer.destroy();
    this.element.remove();
  }
}

/** Tiles of layers come as values; colours are made here. */
async function colour(event) {
  const { lookup, lines, filled } = event.tiledImage.source;
  if (!lookup) return;
  const context = await event.getData("context2d");
  if (event.outdated()) return;
  const image = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
  const values = lines.length ? image.data.slice() : null;
  if (filled) recolour(image.data, lookup);
  else image.data.fill(0);
  if (values) drawLines(values, lines, new Uint32Array(image.data.buffer), image.width);
  context.putImageData(image, 0, 0);
  await event.setData(context, "context2d");
}

const SETTINGS = {
  drawer: "canvas", // WebGL composites translucent layers wrongly
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorSizeRatio: 0.18,
  navigatorMaintainSizeRatio: true,
  navigatorAutoFade: false,
  navigatorBackground: "#ffffff",
  navigatorBorderColor: "#5b6570",
  navigatorDisplayRegionColor: "#0b5cad",
  navigatorOpacity: 1,
  animationTime: window.matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5,
  blendTime: 0,
  preserveImageSizeOnResize: true, // a panel that opens does not change the magnification
  imageLoaderLimit: 8,
  maxImageCacheCount: 600,
  maxZoomPixelRatio: MOST_SCREEN_PX,
  minZoomImageRatio: 0.7,
  visibilityRatio: 0.2,
  zoomPerScroll: 1.3,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  gestureSettingsTouch: { dblClickToZoom: true },
  gestureSettingsPen: { clickToZoom: false },
};
