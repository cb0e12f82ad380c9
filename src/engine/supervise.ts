// What happens when something goes wrong: the first failure ends every rank, in bounded time, and is told in full.

import { EXIT, fail, TpError } from '../errors.js';
import { type FailureReport, type RankState, reportFailure, summarize, takeScene } from './failure.js';
import { endAll, within } from './process.js';
import { onEndSignal } from './signals.js';

/** Between SIGTERM and SIGKILL, in ms. */
const GRACE_MS = 300;
/** A failure waits this long for one that came before it but was heard of later. */
const SETTLE_MS = 60;

/** Ranks that are asked for their last collectives before they are ended have this long to answer, in ms. */
const INQUIRY_MS = 250;

/** What a supervisor asks of the run that it watches over. */
export interface Watched {
  run: string;
  /** Asks the ranks that live for their last collectives; resolves when all have answered. */
  inquire(): Promise<unknown>;
  /** What the collective library says of a run that failed with `error`, asked while the ranks live; bounded. */
  diagnose(error: TpError): Promise<string | null>;
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
  /** `failed` is settled. */
  #ended = false;
  /** Those who wait for something else meanwhile. */
  readonly #guarded = new Set<(error: unknown) => void>();
  #finished: Promise<void> | null = null;
  readonly #releaseSignals: () => void;

  /** Takes over the signals at once: install it before anything is started. */
  constructor(ranks: RankState[], watched: Watched) {
    this.#ranks = ranks;
    this.#watched = watched;
    this.failed = new Promise((_, reject) => {
      this.#reject = reject;
    });
    this.failed.catch(() => {}); // it may fail while nobody waits
    this.#releaseSignals = onEndSignal((signal) => this.#interrupt(signal));
    process.once('exit', this.#killAll);
  }

  /** True from the first failure or the beginning of the end. */
  get over(): boolean {
    return this.#over || this.#first !== null;
  }

  /** `promise`, or the run's failure if that comes first. Not by Promise.race: `failed` would keep every job's promise. */
  guard<T>(promise: Promise<T>): Promise<T> {
    if (this.#ended) return this.failed;
    return new Promise((resolve, reject) => {
      this.#guarded.add(reject);
      promise.then(resolve, reject).finally(() => this.#guarded.delete(reject));
    });
  }

  /** A failure seen at `at` (performance.now()). Failures close together: the earliest is the root cause. */
  fail(error: Error, at = performance.now()): void {
    if (this.#over) return;
    if (!this.#first) setTimeout(() => this.#end(), SETTLE_MS);
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

  #interrupt(signal: NodeJS.Signals): void {
    this.#first ??= { error: fail('TP_INTERRUPTED', signal), at: performance.now() };
    if (this.#over)
      this.#killAll(); // the user insists
    else this.#end();
  }

  readonly #killAll = (): void => {
    for (const { process } of this.#ranks) process.kill('SIGKILL');
  };

  #end(): void {
    if (this.#over) return;
    this.#over = true;
    const { error } = this.#first!;
    // whatever goes wrong on the way, who waits for the run must hear of its end
    this.#explain(error).then(
      (told) => this.#announce(told),
      () => this.#announce(error),
    );
  }

  #announce(error: Error): void {
    this.#ended = true;
    this.#reject(error);
    for (const reject of this.#guarded) reject(error);
  }

  /** Ends every rank; the error with all that is known about it. */
  async #explain(error: Error): Promise<Error> {
    if (!(error instanceof TpError) || error.exitCode !== EXIT.worker) {
      await this.#endAll(0);
      return error;
    }
    const [ras] = await Promise.all([
      this.#watched.diagnose(error),
      within(this.#watched.inquire(), INQUIRY_MS),
    ]);
    // taken now: the end itself changes what the ranks look like
    const scene = takeScene(this.#ranks);
    await this.#endAll(0);
    const report = reportFailure(this.#watched.run, error, scene, ras);
    this.#watched.onFailure(report);
    return summarize(error, report, scene);
  }

  async #endAll(patienceMs: number): Promise<void> {
    await endAll(
      this.#ranks.map((r) => r.process),
      patienceMs,
      GRACE_MS,
    );
    this.#releaseSignals();
    process.off('exit', this.#killAll);
    this.#watched.cleanUp();
  }
}
