// What happens when something goes wrong: the first failure ends every rank, in bounded time, and is told in full.

import { EXIT, fail, TpError } from '../errors.js';
import { type FailureReport, type RankState, reportFailure, summarize, takeScene } from './failure.js';
import { endAll, within } from './process.js';

/** Between SIGTERM and SIGKILL, in ms. */
const GRACE_MS = 300;
/** A failure waits this long for one that came before it but was heard of later. */
const SETTLE_MS = 60;

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** Ranks that are asked for their last collectives before they are ended have this long to answer, in ms. */
const INQUEST_MS = 250;

/** What a supervisor asks of the run that it watches over. */
export interface Watched {
  run: string;
  /** Asks the ranks that live for their last collectives; resolves when all have answered. */
  inquire(): Promise<unknown>;
  /** Runs when all ranks are gone. */
  cleanUp(): void;
  /** A run whose ranks failed, told in full. */
  onFailure(report: FailureReport): void;
}

/** Ends the run once, whatever goes wrong first. */
export class Supervisor {
  /** Rejects with the root cause when every process is gone; never resolves. */
  readonly failed: Promise<never>;
  readonly #ranks: RankState[];
  readonly #watched: Watched;
  #reject!: (error: unknown) => void;
  #first: { error: Error; at: number } | null = null;
  #over = false;
  #finished: Promise<void> | null = null;

  /** Takes over the signals at once: install it before anything is started. */
  constructor(ranks: RankState[], watched: Watched) {
    this.#ranks = ranks;
    this.#watched = watched;
    this.failed = new Promise((_, reject) => {
      this.#reject = reject;
    });
    this.failed.catch(() => {}); // it may fail while nobody waits
    for (const signal of SIGNALS) process.on(signal, this.#interrupt);
    process.once('exit', this.#killAll);
  }

  /** True from the first failure or the beginning of the end. */
  get over(): boolean {
    return this.#over || this.#first !== null;
  }

  /** `promise`, or the run's failure if that comes first. */
  guard<T>(promise: Promise<T>): Promise<T> {
    return Promise.race([promise, this.failed]);
  }

  /** A failure seen at `at` (performance.now()). Failures close together: the earliest is the root cause. */
  fail(error: Error, at = performance.now()): void {
    if (this.#over) return;
    if (!this.#first) setTimeout(() => void this.#end(), SETTLE_MS);
    if (!this.#first || at < this.#first.at) this.#first = { error, at };
  }

  /** The regular end: waits `ms` for the ranks to leave by themselves. */
  async finish(ms: number): Promise<void> {
    if (!this.over) {
      this.#over = true;
      this.#finished = this.#endAll(ms);
    }
    await (this.#finished ?? this.failed.catch(() => {}));
  }

  readonly #interrupt = (signal: NodeJS.Signals): void => {
    this.#first ??= { error: fail('TP_INTERRUPTED', signal), at: performance.now() };
    if (this.#over)
      this.#killAll(); // the user insists
    else void this.#end();
  };

  readonly #killAll = (): void => {
    for (const { process } of this.#ranks) process.kill('SIGKILL');
  };

  async #end(): Promise<void> {
    if (this.#over) return;
    this.#over = true;
    const { error } = this.#first!;
    const failed = error instanceof TpError && error.exitCode === EXIT.worker;
    if (failed) await within(this.#watched.inquire(), INQUEST_MS);
    // taken now: the end itself changes what the ranks look like
    const scene = takeScene(this.#ranks);
    await this.#endAll(0);
    if (!failed) return this.#reject(error);
    const report = reportFailure(this.#watched.run, error, scene);
    this.#watched.onFailure(report);
    this.#reject(summarize(error, report, scene));
  }

  async #endAll(patienceMs: number): Promise<void> {
    await endAll(
      this.#ranks.map((r) => r.process),
      patienceMs,
      GRACE_MS,
    );
    for (const signal of SIGNALS) process.off(signal, this.#interrupt);
    process.off('exit', this.#killAll);
    this.#watched.cleanUp();
  }
}
