// A run that survives its ranks: when one fails they all start again, and the sequences go on behind the tokens that
// were given out. The numbers do not depend on where a run was cut, so the rest is what it would have been.

import { EXIT, TpError } from '../errors.js';
import { log } from '../log.js';
import type { OnStep } from './execution.js';
import type { GenerateJob, Job, JobResult, SequenceSpec } from './job.js';
import type { Run } from './launcher.js';
import type { MergedStep } from './merge.js';
import { pause } from './signals.js';

/** Backoff between two starts, in ms: doubled each time, so that a fault that stays does not burn the machine. */
const FIRST_BACKOFF_MS = 50;
const LONGEST_BACKOFF_MS = 5000;

/** Starts a run, and starts it again up to `restarts` times when its ranks fail. */
export async function launchAgain(start: () => Promise<Run>, restarts: number): Promise<Run> {
  if (restarts === 0) return start();
  const run = new RecoveringRun(start, restarts);
  await run.start();
  return run;
}

class RecoveringRun implements Run {
  readonly #start: () => Promise<Run>;
  readonly #restarts: number;
  #used = 0;
  #backoffMs = FIRST_BACKOFF_MS;
  #run!: Run;

  constructor(start: () => Promise<Run>, restarts: number) {
    this.#start = start;
    this.#restarts = restarts;
  }

  get collective(): Run['collective'] {
    return this.#run.collective;
  }

  get ranks(): Run['ranks'] {
    return this.#run.ranks;
  }

  async start(): Promise<void> {
    for (;;) {
      try {
        this.#run = await this.#start();
        return;
      } catch (error) {
        await this.#backOff(error);
      }
    }
  }

  /** Only decoding is taken up again: other jobs are measurements and comparisons, which must not be disturbed. */
  async execute(job: Job, onStep: OnStep = () => {}): Promise<JobResult[]> {
    if (job.kind !== 'generate') return this.#run.execute(job, onStep);
    const progress = new Progress(job);
    for (;;) {
      try {
        await this.#run.execute(progress.rest(), (step) => onStep(progress.add(step)));
        return progress.results(this.#run.ranks.length);
      } catch (error) {
        if (progress.done) return progress.results(this.#run.ranks.length);
        await this.#backOff(error);
        await this.start();
        this.#backoffMs = FIRST_BACKOFF_MS;
      }
    }
  }

  close(): Promise<void> {
    return this.#run.close();
  }

  /** Waits before the next start; throws the error if no start can mend it or there have been enough. TP_INTERRUPTED. */
  async #backOff(error: unknown): Promise<void> {
    if (!isMendable(error) || this.#used === this.#restarts) throw error;
    this.#used++;
    log.warn(`restart ${this.#used} of ${this.#restarts} after ${error.message.split('\n')[0]}`);
    await pause(this.#backoffMs);
    this.#backoffMs = Math.min(2 * this.#backoffMs, LONGEST_BACKOFF_MS);
  }
}

/** Ranks that disagree would give other tokens from here on: that must be seen, not hidden. */
function isMendable(error: unknown): error is TpError {
  return error instanceof TpError && error.exitCode === EXIT.worker && error.code !== 'TP_RANKS_DISAGREE';
}

/** What a job has given out so far. */
class Progress {
  readonly #job: GenerateJob;
  readonly #given = new Map<number, number[]>();
  readonly #finished = new Set<number>();
  /** Steps over all starts. */
  #steps = 0;

  constructor(job: GenerateJob) {
    this.#job = job;
  }

  get done(): boolean {
    return this.#job.sequences.every((s) => s.maxTokens === 0 || this.#finished.has(s.sequence));
  }

  /** Takes a step in; the same step, counted over all starts. */
  add(step: MergedStep): MergedStep {
    for (const { sequence, token, finish } of step.rows) {
      const given = this.#given.get(sequence) ?? [];
      given.push(token);
      this.#given.set(sequence, given);
      if (finish !== null) this.#finished.add(sequence);
    }
    return { ...step, step: this.#steps++ };
  }

  /** The job that is left. */
  rest(): GenerateJob {
    const left = this.#job.sequences.filter((s) => !this.#finished.has(s.sequence));
    return { ...this.#job, sequences: left.map((s) => this.#continued(s)) };
  }

  results(ranks: number): JobResult[] {
    return Array.from({ length: ranks }, () => ({ kind: 'generate', steps: this.#steps }));
  }

  #continued(spec: SequenceSpec): SequenceSpec {
    const given = this.#given.get(spec.sequence) ?? [];
    return {
      ...spec,
      promptIds: [...spec.promptIds, ...given],
      maxTokens: spec.maxTokens - given.length,
      replay: given.length,
    };
  }
}
