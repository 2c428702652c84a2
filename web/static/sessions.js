// A live session of this page. Its turns are numbered here, and asked one after another on a line of its own or of its story's.

import { ask, newId } from "./wire.js";

const mine = new Map(); // tag → what this page calls the session; for the look inside

export const isMine = (tag) => mine.get(tag);

export class Session {
  /** `name`: what people are shown for it. */
  constructor(model, line, name, id = newId(), turn = 0) {
    Object.assign(this, { model, line, name, id, turn, have: turn, closed: false });
  }

  open() {
    return ask({ do: "open", line: this.line, session: this.id, model: this.model }).then((done) => this.#known(done));
  }

  /** One turn for each of `brought[kind]`; `each` is called with every answer. */
  turns(brought, each, options = {}) {
    const count = Object.values(brought)[0].length;
    const first = this.turn + 1;
    this.turn += count;
    return ask({ do: "turns", line: this.line, session: this.id, first, have: this.have, ...brought, ...options }, (answer) => {
      if (answer.turn !== this.have + 1) return; // told of already: it was asked again
      this.have = answer.turn;
      each(answer);
    });
  }

  /** Another that goes on from here, once the turns before have run. */
  fork(name = this.name) {
    const fork = new Session(this.model, this.line, name, newId(), this.turn);
    fork.made = ask({ do: "fork", line: this.line, session: this.id, fork: fork.id }).then((done) => fork.#known(done));
    return fork;
  }

  close() {
    closeAll([this]);
  }

  #known(done) {
    this.tag = done.tag;
    mine.set(done.tag, this.name);
    return this;
  }
}

export function closeAll(sessions) {
  const lines = Map.groupBy ? Map.groupBy(sessions, (session) => session.line) : grouped(sessions);
  for (const [line, of] of lines) {
    const open = of.filter((session) => !session.closed);
    for (const session of open) session.closed = true;
    if (open.length) ask({ do: "close", line, sessions: open.map((session) => session.id) }).catch(() => {}); // they end by themselves
  }
}

function grouped(sessions) {
  const lines = new Map();
  for (const session of sessions) lines.set(session.line, [...(lines.get(session.line) ?? []), session]);
  return lines;
}
