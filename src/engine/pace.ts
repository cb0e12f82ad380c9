// How many decode steps to run at a time: as many as a reader does not notice. Every rank must run the same number: one
// step more on one of them would wait for the others' part of it when a sequence ends on the way.

import type { StepResult } from '../native.js';
import type { Active } from './batching.js';

/** What a step gave, and how long it took. */
export interface Outcome {
  result: StepResult;
  time: { computeMs: number; syncMs: number };
}

/** Tokens of a burst come out together: this long is not seen, and hides the host's part. */
const BURST_MS = 50;
const MOST_BURST = 64;
/** Bursts until the ranks agree again: steps get slower as the context grows. */
const AGREED_FOR = 16;

/** Clocks differ from rank to rank, so the length comes from `agree`, which gives all ranks the smallest of their numbers. */
export class Pace {
  readonly #agree: (length: number) => Promise<number>;
  #length = 1;
  #sequences = 0;
  /** Bursts for which the length stays. */
  #stays = 0;

  constructor(agree: (length: number) => Promise<number>) {
    this.#agree = agree;
  }

  /** Steps of the next burst: none goes past the end of a sequence that is known beforehand. */
  steps(active: readonly Active[]): number {
    const left = active.map((s) => s.spec.maxTokens - (s.tokens.length - s.spec.promptIds.length));
    return Math.min(this.#length, ...left);
  }

  /** Learns from a burst of `sequences` sequences; all ranks call it after the same bursts. */
  async took(outcomes: readonly Outcome[], sequences: number): Promise<void> {
    if (sequences !== this.#sequences) this.#stays = 0;
    this.#sequences = sequences;
    if (this.#stays-- > 0) return;
    const stepMs = outcomes.reduce((ms, { time }) => ms + time.computeMs, 0) / outcomes.length;
    const most = Math.min(MOST_BURST, 2 * this.#length);
    const length = await this.#agree(Math.max(1, Math.min(most, Math.floor(BURST_MS / stepMs))));
    // no rank was kept from doubling by anything but time
    this.#stays = length < 2 * this.#length ? AGREED_FOR : 0;
    this.#length = length;
  }
}
