// A text gone on with, symbol by symbol. With its seed it is the same text again, so one that broke off is simply asked for anew.

import { $, announcer, h } from "./dom.js";
import { ask, forget, insist } from "./wire.js";

let running = null;
let wanted = 0;
let given = "";
let made = "";
const announce = announcer($("#g-live"), 200);
const ENDED = { limit: "as many as were asked for", end: "the model ended it", stop: "it came to a stop" };

export async function start() {
  const temperature = $("#g-temperature");
  temperature.addEventListener("input", () => ($("#g-temperature-out").value = temperature.value));
  $("#g-form").addEventListener("submit", (event) => {
    event.preventDefault();
    write($("#g-text").value);
  });
  $("#g-on").addEventListener("click", () => write(given + made));
  $("#g-stop").addEventListener("click", () => forget(running));
  $("#g-dice").addEventListener("click", () => {
    $("#g-seed").value = String(Math.floor(Math.random() * 1e6));
    write($("#g-text").value);
  });
}

async function write(text) {
  forget(running);
  const mine = ++wanted;
  const out = $("#g-out");
  const began = performance.now();
  let symbols = 0;
  let node;
  const clear = () => {
    symbols = 0;
    made = "";
    node = document.createTextNode("");
    out.replaceChildren(h("span", { class: "given" }, given), node);
  };
  given = text;
  clear();
  busy(true);
  const seed = Math.max(0, Math.floor(Number($("#g-seed").value)) || 0);
  const add = (piece) => {
    if (mine !== wanted) return;
    symbols++;
    made += piece.text;
    node.appendData(piece.text);
    if (out.scrollHeight - out.scrollTop - out.clientHeight < 80) out.scrollTop = out.scrollHeight;
  };
  const told = (how) => {
    const seconds = (performance.now() - began) / 1000;
    $("#g-facts").replaceChildren(h("strong", null, `${symbols} characters`), ` in ${seconds.toFixed(2)} s, ${Math.round(symbols / seconds)} a second; ${how}. Seed ${seed}.`);
  };
  try {
    const done = await insist(() => {
      running = ask({ do: "generate", text: text.slice(-2000), temperature: Number($("#g-temperature").value), seed, symbols: 500 }, add, false);
      return running;
    }, clear);
    told(ENDED[done.ended] ?? done.ended);
    announce(`${symbols} characters written.`);
  } catch (error) {
    if (mine !== wanted) return;
    if (error.reason === "FORGOTTEN") told("stopped");
    else $("#g-facts").textContent = `The server would not: ${error.message}`;
  } finally {
    if (mine === wanted) busy(false);
  }
}

function busy(is) {
  $("#g-stop").disabled = !is;
  $("#g-on").disabled = is || !made;
}
