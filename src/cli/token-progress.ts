// How far decoding is, on the terminal's last line: tokens done and to come, tokens a second.

import type { MergedStep } from '../engine/merge.js';
import { log } from '../log.js';
import { short } from '../report/table.js';

/** Between two looks of a reader, in ms. */
const EVERY_MS = 100;

export class TokenProgress {
  /** Most tokens that can still come; a sequence that stops early takes its rest away. */
  #total: number;
  readonly #left: number[];
  #done = 0;
  /** When the first tokens came, and how many: what the rate is counted from. */
  #first: { at: number; tokens: number } | null = null;
  #shownAt = Number.NEGATIVE_INFINITY;

  /** `prompts` sequences of at most `each` new tokens. */
  constructor(prompts: number, each: number) {
    this.#total = prompts * each;
    this.#left = Array(prompts).fill(each);
  }

  /** Takes a step in, at `now` (performance.now()). */
  add(step: Pick<MergedStep, 'rows'>, now = performance.now()): void {
    for (const { sequence, finish } of step.rows) {
      this.#done++;
      this.#left[sequence]!--;
      if (finish === 'stop') this.#total -= this.#left[sequence]!;
    }
    if (this.#done > 0) this.#first ??= { at: now, tokens: this.#done };
    if (now - this.#shownAt < EVERY_MS) return;
    this.#shownAt = now;
    log.progress(this.text(now));
  }

  /** `12 of 64 tokens, 35.1 tokens/s`; without a rate until there is one. */
  text(now: number): string {
    const { at, tokens } = this.#first ?? { at: now, tokens: 0 };
    const rate = now > at ? `, ${short((1000 * (this.#done - tokens)) / (now - at))} tokens/s` : '';
    return `${this.#done} of ${this.#total} tokens${rate}`;
  }

  end(): void {
    log.progress('');
  }
}
