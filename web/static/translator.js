// A translation as it is decoded, and what each token looked at. The map is a table: hovering, focus and arrow keys all say the same.

import { $, announcer, h, milliseconds, percent } from "./dom.js";
import { ask, forget, insist } from "./wire.js";

const SENTENCES = [
  "Two dogs play in the snow near a frozen lake.",
  "A woman with a red umbrella waits for the bus in the rain.",
  "Children are climbing on a large rock by the sea.",
  "A man is playing the guitar in front of a crowd.",
  "An old man and a little girl are feeding birds in the park.",
  "A man in a blue shirt is standing on a ladder cleaning a window.",
];

let running = null;
let wanted = 0;
let tokens = []; // {text, piece, attention}
let source = []; // known at the end
let chosen = [0, 0]; // the cell that the arrow keys are at
let sentence = 0;
const announce = announcer($("#t-live"), 200);

export async function start() {
  const beam = $("#t-beam");
  beam.addEventListener("input", () => ($("#t-beam-out").value = beam.value));
  beam.addEventListener("change", translate);
  $("#t-form").addEventListener("submit", (event) => {
    event.preventDefault();
    translate();
  });
  $("#t-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      translate();
    }
  });
  $("#t-another").addEventListener("click", () => {
    $("#t-text").value = SENTENCES[sentence++ % SENTENCES.length];
    translate();
  });
  const map = $("#t-map");
  map.addEventListener("pointerover", (event) => event.target.closest("td") && light(...placeOf(event.target.closest("td"))));
  map.addEventListener("pointerleave", () => light());
  map.addEventListener("focusin", (event) => event.target.closest("td") && light(...(chosen = placeOf(event.target))));
  map.addEventListener("focusout", () => light());
  map.addEventListener("keydown", moved);
  translate();
}

async function translate() {
  const text = $("#t-text").value.trim();
  if (!text) return;
  forget(running);
  const mine = ++wanted;
  const began = performance.now();
  const said = $("#t-said");
  const clear = () => {
    tokens = [];
    source = [];
    chosen = [0, 0];
    said.replaceChildren();
    $("#t-map thead").replaceChildren();
    $("#t-map tbody").replaceChildren();
    $("#t-readout").textContent = "\u00a0";
  };
  clear();
  said.classList.add("running");
  try {
    const whole = await insist(() => {
      running = ask({ do: "translate", text, beam: Number($("#t-beam").value) }, (token) => mine === wanted && add(token), false);
      return running;
    }, clear);
    if (mine !== wanted) return;
    finished(whole, (performance.now() - began) / 1000);
  } catch (error) {
    if (mine !== wanted || error.reason === "FORGOTTEN") return;
    $("#t-facts").textContent = `The server would not: ${error.message}`;
  } finally {
    if (mine === wanted) said.classList.remove("running");
  }
}

const word = (piece) => piece.replaceAll("▁", "").replace("</s>", "end");

function add(token) {
  tokens.push(token);
  $("#t-said").append(h("span", { class: "token" }, token.text));
  if (tokens.length === 1) heads(token.attention.map(() => "·"));
  row(token);
}

function heads(names) {
  $("#t-map thead").replaceChildren(h("tr", null, h("th", { scope: "col" }, h("span", { class: "unseen" }, "German")), ...names.map((name) => h("th", { scope: "col" }, h("span", null, name)))));
}

function row(token) {
  const first = !$("#t-map tbody").children.length;
  const cells = token.attention.map((weight, i) => {
    const cell = h("td", { tabindex: first && i === 0 ? "0" : "-1" }, h("span", { class: "unseen" }, percent(weight, 0)));
    cell.style.setProperty("--w", String(Math.sqrt(weight)));
    return cell;
  });
  $("#t-map tbody").append(h("tr", null, h("th", { scope: "row", lang: "de" }, word(token.piece)), ...cells));
}

function finished(whole, seconds) {
  source = whole.source.map(word);
  const texts = tokens.map((token) => token.text);
  if (whole.tokens.map(([piece]) => piece).join() !== tokens.map((token) => token.piece).join()) {
    tokens = whole.tokens.map(([piece, , attention]) => ({ piece, attention, text: piece.replace("▁", " ") }));
    $("#t-map tbody").replaceChildren();
    tokens.forEach(row);
    $("#t-said").textContent = whole.text;
  } else {
    tokens.forEach((token, i) => (token.attention = whole.tokens[i][2]));
    if (texts.join("").trim() !== whole.text.trim()) $("#t-said").textContent = whole.text;
  }
  heads(source);
  const { timing } = whole;
  $("#t-facts").replaceChildren(
    h("strong", null, `${tokens.length} tokens`), ` in ${milliseconds(seconds)} as seen here: ${timing.rounds} rounds of ${milliseconds(timing.run)} in all, ${milliseconds(timing.queue)} of waiting for them. Mean log probability ${whole.score.toFixed(2)}.`,
  );
  announce(whole.text);
}

// The map

function placeOf(cell) {
  return [cell.parentElement.sectionRowIndex, cell.cellIndex - 1];
}

function moved(event) {
  const body = $("#t-map tbody");
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  let [r, c] = chosen;
  if (step) [r, c] = [r + step[0], c + step[1]];
  else if (event.key === "Home") c = 0;
  else if (event.key === "End") c = body.rows[r].cells.length - 2;
  else return;
  const cell = body.rows[r]?.cells[c + 1];
  event.preventDefault();
  if (!cell || c < 0) return;
  body.querySelector('td[tabindex="0"]')?.setAttribute("tabindex", "-1");
  cell.setAttribute("tabindex", "0");
  cell.focus();
}

function light(r = -1, c = -1) {
  const body = $("#t-map tbody");
  for (const lit of document.querySelectorAll("#story-translator .lit")) lit.classList.remove("lit");
  if (r < 0 || !tokens[r]) {
    $("#t-readout").textContent = "\u00a0";
    return;
  }
  body.rows[r].cells[0].classList.add("lit");
  $("#t-map thead").rows[0]?.cells[c + 1]?.classList.add("lit");
  $("#t-said").children[r]?.classList.add("lit");
  const weights = tokens[r].attention;
  const most = weights.indexOf(Math.max(...weights));
  const looked = (i) => source[i] ?? `word ${i + 1}`;
  $("#t-readout").replaceChildren(
    h("strong", { lang: "de" }, word(tokens[r].piece)), " looked ", h("strong", null, percent(weights[c], 0)), " at ", h("strong", null, looked(c)),
    most === c ? ", most of all" : `; most at ${looked(most)} (${percent(weights[most], 0)})`,
  );
}
