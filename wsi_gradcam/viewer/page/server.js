// What the server is asked for, below the page's own address. Addresses are described in app.py.

async function json(address, signal) {
  const answer = await fetch(address, { signal });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error || `the server answered ${answer.status}`);
  return value;
}

async function send(address, value) {
  const answer = await fetch(address, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value),
  });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error || `the server answered ${answer.status}`);
  return found;
}

const query = (values) => new URLSearchParams(values).toString();

export const run = () => json("api/run");
export const slides = (values, signal) => json(`api/slides?${query(values)}`, signal);
/** Facts of a slide; the most probable class and the clusters of the evidence are its last channels. */
async function described(address) {
  const facts = await json(address);
  if (facts.channels.length) facts.channels.push(...[facts.predicted, facts.clustered].filter(Boolean));
  return facts;
}

export const slideNamed = (id) => described(`api/slide?${query({ id })}`);
export const slide = (key) => described(`api/slides/${key}`);
export const values = (key, y, x, signal) => json(`api/slides/${key}/values?${query({ y, x })}`, signal);
export const annotations = (key) => json(`api/slides/${key}/annotations`);
export const agreement = (key, name) => json(`api/slides/${key}/agreement?${query({ class: name })}`);
export const archiveTop = (values, signal) => json(`api/top?${query(values)}`, signal);
export const evidence = () => json("api/evidence");
export const clusterPatches = (number, values) => json(`api/evidence/${number}?${query(values)}`);
export const marks = (key) => json(`api/slides/${key}/marks`);
export const mark = (value) => send("api/marks", value);
export const nameCluster = (value) => send("api/names", value);
export const patchAt = (key, y, x) => json(`api/slides/${key}/patches/at?${query({ y, x })}`);
export const patch = (key, number) => json(`api/slides/${key}/patches/${number}`);
export const top = (key, by, count, order) => json(`api/slides/${key}/patches/top?${query({ by, count, order })}`);

const tiles = (slide) => `tiles/${slide.key}/${slide.version}`;

export const slideTile = (slide, level, row, column) => `${tiles(slide)}/slide/${level}/${row}_${column}.jpg`;
export const heatTile = (slide, { address, classes }, level, row, column, smooth = true) =>
  `${tiles(slide)}/${smooth && !classes ? "heat" : "cells"}/${address}/${level}/${row}_${column}.png`;
export const patchPicture = (slide, number) => `${tiles(slide)}/patch/${number}.jpg`;
export const thumb = (slide) => `${tiles(slide)}/thumb.jpg`;
