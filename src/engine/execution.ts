// One job under way: collects what every rank reports, joins it step by step, and knows when all are done.

import { fail } from '../errors.js';
import { Deferred } from './deferred.js';
import type { JobResult, StepReport } from './job.js';
import { type MergedStep, mergeReports } from './merge.js';

/** Called once per step, in order; the next step is not heard before it resolves. */
export type OnStep = (step: MergedStep) => void | Promise<void>;

export class Execution {
  /** Every rank's result, by rank, when all have finished. */
  readonly done = new Deferred<JobResult[]>();
  readonly #ranks: number;
  readonly #onStep: OnStep;
  /** Steps that some ranks have reported and others have not. */
  readonly #open = new Map<number, Map<number, StepReport>>();
  readonly #results = new Map<number, JobResult>();

  constructor(ranks: number, onStep: OnStep) {
    this.#ranks = ranks;
    this.#onStep = onStep;
  }

  /** Throws TP_RANKS_DISAGREE, and whatever `onStep` throws. */
  async report(rank: number, report: StepReport): Promise<void> {
    const reports = this.#open.get(report.step) ?? new Map<number, StepReport>();
    this.#open.set(report.step, reports.set(rank, report));
    if (reports.size < this.#ranks) return;
    this.#open.delete(report.step);
    await this.#onStep(mergeReports(inOrder(reports, this.#ranks)));
  }

  /** Throws TP_RANKS_DISAGREE when the ranks finished after different steps. */
  result(rank: number, result: JobResult): void {
    this.#results.set(rank, result);
    if (this.#results.size < this.#ranks) return;
    for (const [step, reports] of this.#open) {
      const said = `only ${[...reports.keys()].map((r) => `rank ${r}`).join(', ')} made it`;
      throw fail('TP_RANKS_DISAGREE', step, 'the number of steps', said);
    }
    this.done.resolve(inOrder(this.#results, this.#ranks));
  }
}

function inOrder<T>(byRank: ReadonlyMap<number, T>, ranks: number): T[] {
  return Array.from({ length: ranks }, (_, rank) => byRank.get(rank)!);
}
