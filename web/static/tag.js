// Names in a text, found anew a moment after each change of it.

import { $, announcer, h, hueOf, percent } from "./dom.js";
import { ask, insist } from "./wire.js";

let wanted = 0;
let timer = 0;
let hues = new Map();
const announce = announcer($("#n-live"));

export async function start(offered) {
  const labels = (offered.facts.labels ?? "").split(",").filter(Boolean);
  hues = new Map(labels.map((label, i) => [label, (i * 360) / labels.length + 15]));
  $("#n-text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(find, 180);
  });
  find();
}

async function find() {
  const mine = ++wanted;
  const text = $("#n-text").value;
  if (!text.trim()) {
    drawn(text, [], 0, 0);
    return;
  }
  const began = performance.now();
  try {
    const { spans, words } = await insist(() => ask({ do: "tag", text }));
    if (mine === wanted) drawn(text, spans, words, performance.now() - began);
  } catch (error) {
    if (mine === wanted) $("#n-facts").textContent = `The server would not: ${error.message}`;
  }
}

function drawn(text, spans, words, took) {
  const letters = [...text]; // the server counts code points, JavaScript halves of some
  const parts = [];
  let at = 0;
  for (const span of spans) {
    const mark = h("mark", null, letters.slice(span.start, span.end).join(""), h("span", null, span.label));
    mark.style.setProperty("--hue", String(hues.get(span.label) ?? hueOf(span.label)));
    parts.push(letters.slice(at, span.start).join(""), mark);
    at = span.end;
  }
  parts.push(letters.slice(at).join(""));
  $("#n-out").replaceChildren(...parts);
  $("#n-table tbody").replaceChildren(...spans.map((span) => h("tr", null, h("td", null, span.text), h("td", null, span.label), h("td", null, percent(span.score)))));
  $("#n-facts").textContent = words ? `${words} words read in ${took.toFixed(0)} ms as seen here. Trained on 3,394 posts alone; it misses some, and says how sure it is.` : "";
  announce(spans.length ? `${spans.length} names: ${spans.map((span) => `${span.text}, ${span.label}`).join("; ")}` : "No names found.");
}
