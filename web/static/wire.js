// The one connection of this page. What was asked and has no answer is asked again when a connection broke: sessions have ids of
// our own and numbered turns, so that nothing is lost or done twice (web/live.py).

const pending = new Map(); // id → what was asked; in the order asked
const listeners = { status: new Set(), picture: new Set(), hello: new Set() };
let socket = null;
let next = 1;
let wait = 0;
let watching = 0;
let away = null; // since when the server, or the way to it, is gone
let everHere = false;

export const told = { kill: false }; // what this page may do besides
export const status = { state: "connecting" }; // connecting, here, away (the server), lost (this page's connection)

export class Refused extends Error {
  constructor(error) {
    super(error.message);
    Object.assign(this, error);
  }
}

/** 128 random bits: a session that nobody else can name. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export function on(what, listener) {
  listeners[what].add(listener);
  return () => listeners[what].delete(listener);
}

const tell = (what, value) => listeners[what].forEach((listener) => listener(value));

/**
 * Ask; gives a promise of the answer. `each` is called with every message before the last. `again` tells what to do where the
 * connection broke before the end: true asks again (it changes nothing twice); false fails with reason LOST.
 */
export function ask(message, each = () => {}, again = true) {
  const id = next++;
  const asked = { message: { ...message, id }, each, again };
  asked.promise = new Promise((resolve, reject) => Object.assign(asked, { resolve, reject }));
  asked.promise.id = id;
  pending.set(id, asked);
  if (socket?.readyState === WebSocket.OPEN) send(asked.message);
  return asked.promise;
}

/** End what was asked, without an answer. */
export function forget(promise) {
  const asked = pending.get(promise?.id);
  if (!asked) return;
  pending.delete(promise.id);
  asked.reject(new Refused({ reason: "FORGOTTEN", message: "stopped" }));
  if (socket?.readyState === WebSocket.OPEN) send({ do: "forget", id: next++, of: promise.id });
}

/** Be shown the server's inside; gives what ends it. */
export function watch(listener) {
  const off = on("picture", listener);
  if (listeners.picture.size === 1) {
    watching = next++;
    if (socket?.readyState === WebSocket.OPEN) send({ do: "watch", id: watching });
  }
  return () => {
    off();
    if (!listeners.picture.size && watching) {
      if (socket?.readyState === WebSocket.OPEN) send({ do: "forget", id: next++, of: watching });
      watching = 0;
    }
  };
}

function send(message) {
  socket.send(JSON.stringify(message));
}

function become(state) {
  if (status.state === state) return;
  const gone = state === "away" || state === "lost";
  if (gone) away ??= performance.now();
  const seconds = away === null ? 0 : (performance.now() - away) / 1000;
  const back = state === "here" && everHere && away !== null;
  if (state === "here") {
    everHere = true;
    away = null;
  }
  status.state = state;
  tell("status", { state, back, seconds });
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.onopen = () => {
    wait = 0;
    for (const asked of [...pending.values()]) {
      if (asked.again || !asked.begun) {
        send(asked.message);
      } else {
        pending.delete(asked.message.id);
        asked.reject(new Refused({ reason: "LOST", message: "the connection broke" }));
      }
    }
    if (watching) send({ do: "watch", id: watching });
  };
  socket.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.server) return become(message.server);
    if ("picture" in message) return tell("picture", message);
    if (message.hello) return tell("hello", Object.assign(told, message.hello));
    const asked = pending.get(message.id);
    if (!asked) return;
    if ("done" in message) {
      pending.delete(message.id);
      asked.resolve(message.done);
    } else if (message.error) {
      pending.delete(message.id);
      asked.reject(new Refused(message.error));
    } else {
      asked.begun = true;
      asked.each(message);
    }
  };
  socket.onclose = () => {
    become("lost");
    setTimeout(connect, wait);
    wait = Math.min(3000, wait ? wait * 2 : 150);
  };
}

/** Whether what failed may succeed when it is tried again. */
export const passing = (error) => ["LOST", "UNAVAILABLE", "DRAINING", "DEADLINE_EXCEEDED", "CANCELLED", "SESSION_TAKEN"].includes(error.reason);

/** Whether a session has ended, or is another than we think: what was done with it is to be done anew. */
export const gone = (error) => /^(SESSION_|RECORD_|UNKNOWN_SESSION|FINGERPRINT|MODEL_GONE|STATE_|WRONG_TURN|GAP|ACKNOWLEDGED|OTHER_INPUT|NOT_FOUND|FAILED_PRECONDITION)/.test(error.reason ?? "");

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Ask until the server is there to answer. `begin` is called before each try after the first. */
export async function insist(askOnce, begin = () => {}) {
  for (;;) {
    try {
      return await askOnce();
    } catch (error) {
      if (!passing(error)) throw error;
      await sleep(300);
      begin();
    }
  }
}

connect();
