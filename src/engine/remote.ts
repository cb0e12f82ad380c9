// A rank's process on another node, as the launcher sees it: what that node says of it.

import { Deferred } from './deferred.js';
import type { Exit, RankHandle } from './process.js';

export class RemoteRank implements RankHandle {
  tail: readonly string[] = [];
  exit: Exit | null = null;
  pid: number | undefined;
  readonly closed: Promise<unknown>;
  readonly #gone = new Deferred<void>();
  readonly #kill: (signal: NodeJS.Signals) => void;
  readonly #onExit: (exit: Exit) => void;

  constructor(kill: (signal: NodeJS.Signals) => void, onExit: (exit: Exit) => void) {
    this.closed = this.#gone.promise;
    this.#kill = kill;
    this.#onExit = onExit;
  }

  kill(signal: NodeJS.Signals): void {
    if (this.exit === null) this.#kill(signal);
  }

  /** A process id of another host means nothing here. */
  state(): null {
    return null;
  }

  release(): void {
    this.#gone.resolve();
  }

  /** Its node has seen it end; all its output is in. */
  ended(code: number | null, signal: NodeJS.Signals | null, tail: readonly string[]): void {
    if (this.exit) return;
    this.tail = tail;
    this.exit = { code, signal, at: performance.now() };
    this.#onExit(this.exit);
    this.#gone.resolve();
  }

  /** Its node is gone; nothing more will be heard of it. Not news by itself: the node's loss is. */
  lose(): void {
    this.exit ??= { code: null, signal: null, at: performance.now() };
    this.#gone.resolve();
  }
}
