// Small helpers to make and find elements.

export const find = (id) => document.getElementById(id);

/** An element: element("a", {href: "#", class: "x", onclick: f}, "text", child). */
export function element(tag, settings = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Replace what is in an element; null stands for nothing. */
export function fill(parent, ...children) {
  parent.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

export function option(value, text, chosen = false) {
  return element("option", { value, selected: chosen }, text);
}

/** Calls `function` once, `wait` ms after the last of many calls. */
export function later(wait, action) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
}

/** A bar for a share of 0 to 1, beside its number. */
export function shareBar(share) {
  const bar = element("span", { class: "share", "aria-hidden": "true" }, element("span"));
  bar.firstChild.style.width = `${100 * Math.min(1, Math.max(0, share || 0))}%`;
  return bar;
}

/** Tell screen readers. */
export function say(text) {
  find("said").textContent = text;
}

/** A number as people read it: 0.123, 12.3, 1234. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 0)));
}

/** Micrometres with a fitting unit. */
export function length(um) {
  if (Math.abs(um) >= 1000) return `${Number((um / 1000).toPrecision(4))} mm`;
  return `${Number(um.toPrecision(3))} µm`;
}
