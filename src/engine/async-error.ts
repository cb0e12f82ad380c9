// Errors that a device collective meets while nobody calls it: a lost peer, a broken link. The kernel that waits for that
// peer never ends by itself, so somebody has to look.

import type { NativeEngine } from '../native.js';

/** NCCL is asked so often, in ms; asking costs it a microsecond. */
const POLL_MS = 100;

/** Frees the engine's call under way, which then fails with the collective's own words. */
export class AsyncErrorPoll {
  /** What the collective said, '' = nothing so far. */
  error = '';
  #timer: NodeJS.Timeout | undefined;

  start(engine: Pick<NativeEngine, 'collectiveError' | 'abort'>): void {
    this.#timer = setInterval(() => {
      this.error = engine.collectiveError();
      if (this.error === '') return;
      this.stop();
      engine.abort();
    }, POLL_MS);
    this.#timer.unref();
  }

  stop(): void {
    clearInterval(this.#timer);
  }
}
