// What happens when something goes wrong: the first failure ends every rank, in bounded time, and is told in full.

import type { Stage } from '../comm/messages.js';
import { fail, TpError } from '../errors.js';
import { type Exit, endAll, type RankHandle } from './process.js';

/** Between SIGTERM and SIGKILL, in ms. */
const GRACE_MS = 300;
/** A failure waits this long for one that came before it but was heard of later. */
const SETTLE_MS = 60;

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** What the launcher knows of one rank. */
export interface RankState {
  rank: number;
  host: string;
  process: RankHandle;
  stage: Stage;
  /** The kind of job that it is at, null between jobs. */
  job: string | null;
  /** It has told what went wrong with it: its exit is no news. */
  confessed: boolean;
  /** Last completed step, -1 before the first. */
  step: number;
  /** performance.now() of its last message. */
  heardAt: number;
}

/** Ends the run once, whatever goes wrong first. */
export class Supervisor {
  /** Rejects with the root cause when every process is gone; never resolves. */
  readonly failed: Promise<never>;
  readonly #ranks: RankState[];
  readonly #cleanUp: () => void;
  #reject!: (error: unknown) => void;
  #first: { error: Error; at: number } | null = null;
  #over = false;
  #finished: Promise<void> | null = null;

  /** Takes over the signals at once: install it before anything is started. `cleanUp` runs when all ranks are gone. */
  constructor(ranks: RankState[], cleanUp: () => void) {
    this.#ranks = ranks;
    this.#cleanUp = cleanUp;
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
    // taken now: the end itself changes what the ranks look like
    const lines = this.#ranks.map(describeRank);
    await this.#endAll(0);
    const { error } = this.#first!;
    this.#reject(error instanceof RankFailure ? error.withSummary(this.#ranks, lines) : error);
  }

  async #endAll(patienceMs: number): Promise<void> {
    await endAll(
      this.#ranks.map((r) => r.process),
      patienceMs,
      GRACE_MS,
    );
    for (const signal of SIGNALS) process.off(signal, this.#interrupt);
    process.off('exit', this.#killAll);
    this.#cleanUp();
  }
}

/** A failure of one or more ranks; its message grows a summary when all output is in. */
export class RankFailure extends TpError {
  readonly #culprits: readonly number[];

  constructor(error: TpError, culprits: readonly number[]) {
    super(error.code, error.exitCode, error.text, error.at);
    this.#culprits = culprits;
  }

  withSummary(ranks: readonly RankState[], lines: readonly string[]): TpError {
    const tails = ranks
      .filter(({ rank, process }) => this.#culprits.includes(rank) && process.tail.length)
      .map(({ rank, process }) =>
        [`last lines of rank ${rank}:`, ...process.tail.map((l) => `  | ${l}`)].join('\n'),
      );
    return new TpError(this.code, this.exitCode, [this.text, ...lines, ...tails].join('\n'));
  }
}

/** `  rank 1 on vm (pid 71): in generate, last completed step 12; killed by SIGKILL` */
function describeRank(state: RankState): string {
  const { rank, host, process } = state;
  return `  rank ${rank} on ${host} (pid ${process.pid}): ${describePlace(state)}; ${describeExit(process.exit)}`;
}

/** `in stage weights, no step completed`, `in generate, last completed step 12` */
export function describePlace({ stage, job, step }: RankState): string {
  const steps = step < 0 ? 'no step completed' : `last completed step ${step}`;
  return `in ${job ?? `stage ${stage}`}, ${steps}`;
}

/** `killed by SIGKILL`, `exited with code 4`, `running` */
export function describeExit(exit: Exit | null): string {
  if (!exit) return 'running';
  if (exit.signal === null && exit.code === null) return 'lost with its node';
  return exit.signal ? `killed by ${exit.signal}` : `exited with code ${exit.code}`;
}
