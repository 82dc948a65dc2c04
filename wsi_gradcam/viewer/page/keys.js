// Keyboard shortcuts, and the dialog that lists them.

import { element, find } from "./dom.js";

/** Listen for `actions`: lists of [keys, text, action]. */
export function listen(actions) {
  const byKey = new Map(actions.flatMap(([keys, , action]) => keys.map((key) => [key, action])));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || takesKeys(event.target, event.key)) return;
    if (find("help-dialog").open) return;
    const action = byKey.get(event.key);
    if (!action) return;
    if (event.key === "Enter") { // what has the focus may need it
      if (!event.target.matches("button, a, summary, input") && action()) event.preventDefault();
      return;
    }
    event.preventDefault();
    action();
  });
  const rows = actions.map(([keys, text]) => element("tr", {},
    element("td", {}, ...keys.flatMap((key) => [element("kbd", {}, NAMES[key] || key), " "])), element("td", {}, text)));
  find("help-dialog").append(
    element("h2", { id: "help-title" }, "Keyboard shortcuts"),
    element("table", {}, element("tbody", {}, ...rows)),
    element("p", {}, "Click on the slide to see the patch there. The address of the page contains the view: copy it to show " +
      "someone else the same. Colours change only what is displayed, never the stored values."),
    element("button", { type: "button", autofocus: true, onclick: () => find("help-dialog").close() }, "Close"),
  );
}

const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc" };

/** Whether what has the focus needs the key itself. */
function takesKeys(target, key) {
  if (target.isContentEditable || target.matches("textarea, select, input[type=search], input[type=number], input[type=text]")) {
    return key !== "Escape";
  }
  if (target.matches("input[type=range], input[type=radio]")) return key.startsWith("Arrow");
  return false;
}
