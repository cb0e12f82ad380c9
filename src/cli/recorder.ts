// Gathers what the steps of a run say into one record per prompt and the times of the whole.

import type { MergedStep } from '../engine/merge.js';
import { quantile } from '../report/stats.js';

/** What a run said of one prompt. */
export interface PromptRecord {
  tokenIds: number[];
  logprobs: number[];
  /** Log-probability of the prompt's next token at each position (score). */
  targetLogprobs: (number | null)[];
  finish: 'length' | 'stop' | null;
  /** Logits rows in order, [vocab] each; empty unless kept. */
  logits: Float32Array[];
}

/** Where the time of one token went on rank 0, in ms. */
export interface Shares {
  compute: number;
  sync: number;
  host: number;
}

export class Recorder {
  readonly records: PromptRecord[];
  prefillMs = 0;
  /** Time of each decode step, in ms: every sequence in it got one token. */
  readonly tpotMs: number[] = [];
  readonly #shares: Shares = { compute: 0, sync: 0, host: 0 };

  constructor(prompts: number) {
    this.records = Array.from({ length: prompts }, () => ({
      tokenIds: [],
      logprobs: [],
      targetLogprobs: [],
      finish: null,
      logits: [],
    }));
  }

  add(step: MergedStep): void {
    const vocab = step.logits ? step.logits.length / step.rows.length : 0;
    for (const [r, row] of step.rows.entries()) {
      const record = this.records[row.sequence]!;
      if (row.token >= 0) record.tokenIds.push(row.token);
      record.logprobs.push(row.logprob);
      record.targetLogprobs.push(row.targetLogprob);
      record.finish = row.finish;
      if (step.logits) record.logits.push(step.logits.subarray(r * vocab, (r + 1) * vocab));
    }
    const { computeMs, syncMs, hostMs } = step.time;
    const ms = computeMs + syncMs + hostMs;
    if (step.kind === 'prefill') {
      this.prefillMs += ms;
      return;
    }
    this.tpotMs.push(ms);
    this.#shares.compute += computeMs;
    this.#shares.sync += syncMs;
    this.#shares.host += hostMs;
  }

  get tokens(): number {
    return this.records.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0);
  }

  /** Mean time of a decode step by part, in ms; null when no step was decoded. */
  get shares(): Shares | null {
    const steps = this.tpotMs.length;
    const { compute, sync, host } = this.#shares;
    return steps ? { compute: compute / steps, sync: sync / steps, host: host / steps } : null;
  }

  get tpot(): { median: number; p90: number; samples: number[] } {
    return { median: quantile(this.tpotMs, 0.5), p90: quantile(this.tpotMs, 0.9), samples: this.tpotMs };
  }
}
