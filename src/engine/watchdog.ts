// The watchdog of a run: which rank is missing at which stage, and who holds up a step.

import { STAGES, type Stage } from '../comm/messages.js';
import { fail } from '../errors.js';
import { RankFailure, type RankState } from './failure.js';

const TICK_MS = 50;
/** A tick that comes so late means that this process was stopped, or held up by whoever reads its output. */
const HELD_UP_MS = 4 * TICK_MS;
/** A rank whose event loop is alive answers `where` well within this. */
const ANSWER_MS = 500;

interface Limits {
  initTimeoutMs: number;
  stepTimeoutMs: number;
}

/** What a rank says when it is asked where it is. */
interface Answer {
  doing: string;
  /** Held up by another rank, not busy itself. */
  waits: boolean;
}

/** Looks at the ranks again and again until `stop`; calls `onLate` once. */
export class Watchdog {
  readonly #ranks: readonly RankState[];
  readonly #limits: Limits;
  readonly #ask: (rank: number) => void;
  readonly #onLate: (error: Error) => void;
  readonly #timer: NodeJS.Timeout;
  readonly #answers = new Map<number, Answer>();
  #asking = false;
  /** A rank has ended because of it: there is no way back. */
  #gaveUp = false;
  #slowest: Stage = 'spawn';
  #movedAt = performance.now();
  #lookedAt = performance.now();

  constructor(
    ranks: readonly RankState[],
    limits: Limits,
    ask: (rank: number) => void,
    onLate: (error: Error) => void,
  ) {
    this.#ranks = ranks;
    this.#limits = limits;
    this.#ask = ask;
    this.#onLate = onLate;
    this.#timer = setInterval(() => this.#look(performance.now()), TICK_MS);
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  /** A rank's word on itself, asked for or not. */
  answer(rank: number, answer: Answer): void {
    this.#answers.set(rank, answer);
  }

  /** A rank has given up waiting: asks every rank where it is, then names those that hold the others up. */
  inquire(): void {
    this.#gaveUp = true;
    this.#inquire();
  }

  #inquire(): void {
    if (this.#asking) return;
    this.#asking = true;
    const before = this.#progress();
    for (const { rank } of this.#ranks) this.#ask(rank);
    setTimeout(() => {
      if (this.#gaveUp || this.#progress() === before) return this.#onLate(this.#stepTimeout());
      // a step that came while the ranks were asked is good enough
      this.#answers.clear();
      this.#asking = false;
    }, ANSWER_MS);
  }

  #progress(): string {
    return this.#ranks.map(({ job, step }) => `${job} ${step}`).join();
  }

  #look(now: number): void {
    this.#forgive(now);
    const starting = this.#ranks.filter((r) => r.stage !== 'ready');
    if (starting.length) this.#lookAtStages(starting, now);
    else if (this.#ranks.some((r) => r.job !== null && now - r.heardAt > this.#limits.stepTimeoutMs))
      this.#inquire();
  }

  /** Time in which this process did not run counts against nobody: the ranks' words may lie unread. */
  #forgive(now: number): void {
    const heldUp = now - this.#lookedAt;
    this.#lookedAt = now;
    if (heldUp < HELD_UP_MS) return;
    for (const rank of this.#ranks) rank.heardAt = Math.min(now, rank.heardAt + heldUp);
    this.#movedAt = Math.min(now, this.#movedAt + heldUp);
  }

  /** Only the ranks furthest behind can be late: the others may be waiting for them. */
  #lookAtStages(starting: readonly RankState[], now: number): void {
    const slowest = STAGES[Math.min(...starting.map((r) => STAGES.indexOf(r.stage)))]!;
    if (slowest !== this.#slowest) this.#movedAt = now;
    this.#slowest = slowest;
    const { initTimeoutMs } = this.#limits;
    const behind = starting.filter((r) => r.stage === slowest);
    const late = behind.filter((r) => now - Math.max(r.heardAt, this.#movedAt) > initTimeoutMs);
    if (!late.length) return;
    this.stop();
    const error = fail('TP_STAGE_TIMEOUT', names(late), slowest, initTimeoutMs);
    this.#onLate(
      new RankFailure(
        error,
        late.map((r) => r.rank),
      ),
    );
  }

  #stepTimeout(): Error {
    const silent = this.#ranks.filter((r) => r.process.exit === null && !this.#answers.has(r.rank));
    const busy = this.#ranks.filter((r) => this.#answers.get(r.rank)?.waits === false);
    const lagging = [silent, busy, this.#ranks].find((some) => some.length)!;
    const how = silent.length ? ' (no answer: stopped or stuck)' : '';
    const answered = this.#ranks.filter((r) => this.#answers.has(r.rank));
    const others = answered.map(({ rank }) => `rank ${rank}: ${this.#answers.get(rank)!.doing}`);
    const step = Math.max(...this.#ranks.map((r) => r.step));
    const error = fail(
      'TP_STEP_TIMEOUT',
      `${names(lagging)}${how}`,
      step,
      this.#limits.stepTimeoutMs,
      others,
    );
    return new RankFailure(
      error,
      lagging.map((r) => r.rank),
    );
  }
}

function names(ranks: readonly RankState[]): string {
  return ranks.map((r) => `rank ${r.rank} on ${r.host}`).join(', ');
}
