// The page's address holds the view, so that a link or a reload shows the same: #slide=...&at=y,x&um=...&view=...

/**
 * What the part after # says: slide id, centre (level-0 px), um (micrometres per CSS pixel), views (lists of layers as
 * text, one or two), patch number. Without a slide: the highest patches of all (top), or the evidence: a cluster, 0 all.
 */
export function parsed(hash) {
  const values = new URLSearchParams(hash.replace(/^#/, ""));
  const centre = (values.get("at") || "").split(",").map(Number);
  const um = Number(values.get("um"));
  const patch = values.get("patch");
  const views = ["view", "beside"].filter((name) => values.has(name)).map((name) => layers(values.get(name)));
  return {
    slide: values.get("slide"),
    centre: centre.length === 2 && centre.every(Number.isFinite) ? centre : null,
    um: um > 0 && Number.isFinite(um) ? um : null,
    views,
    outlines: values.get("outlines"),
    turn: [90, 180, 270].includes(Number(values.get("turn"))) ? Number(values.get("turn")) : 0,
    jumps: values.has("jump"),
    top: values.has("top"),
    evidence: values.has("evidence") ? Number(values.get("evidence")) || 0 : null,
    patch: patch !== null && /^\d{1,9}$/.test(patch) ? Number(patch) : null,
  };
}

const layers = (text) => (text === "" ? [] : text.split(";"));

/** The other way round. */
export function formed({ slide, centre, um, views, patch, outlines, turn }) {
  const values = new URLSearchParams();
  if (slide === null) return "#";
  values.set("slide", slide);
  if (centre) values.set("at", centre.map((value) => value.toFixed(1)).join(","));
  if (um) values.set("um", um.toPrecision(6));
  views.forEach((texts, i) => values.set(i === 0 ? "view" : "beside", texts.join(";")));
  if (turn) values.set("turn", String(turn));
  if (outlines) values.set("outlines", outlines);
  if (patch !== null && patch !== undefined) values.set("patch", String(patch));
  return `#${values}`;
}
