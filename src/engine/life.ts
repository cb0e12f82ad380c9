// What a rank tells the launcher about itself: the stage it is at, how far it is, what went wrong.

import { ControlClient } from '../comm/control.js';
import { FlightRecorder } from '../comm/flight-recorder.js';
import { describeError, type Stage } from '../comm/messages.js';
import { EXIT } from '../errors.js';
import { log } from '../log.js';
import type { Job, JobResult, StepReport } from './job.js';
import { type Briefing, packReport, type ReadyInfo } from './wire.js';

/** Between two messages about progress, in ms. */
const PROGRESS_MS = 100;

/** Runs a job; resolves with this rank's result. */
export type RunJob = (job: Job, report: (report: StepReport) => Promise<void>) => Promise<JobResult>;

/** Which rank this process is, and where the launcher listens. */
export interface Place {
  control: string;
  run: string;
  rank: number;
  ranks: number;
  briefing: Briefing;
}

export class Life {
  readonly place: Place;
  readonly control: ControlClient;
  readonly recorder = new FlightRecorder();
  readonly #stageMs: Record<string, number> = {};
  #stage: Stage = 'spawn';
  #since = 0; // performance.now() counts from the start of the process
  #toldAt = 0;
  #hushed = false;
  /** Last completed step, -1 before the first. */
  #step = -1;

  constructor(place: Place) {
    this.place = place;
    const { keys } = place.briefing;
    this.control = new ControlClient(
      place.control,
      place.run,
      place.rank,
      keys && { own: keys.own, server: keys.launcher },
    );
  }

  enter(stage: Stage): void {
    const now = performance.now();
    this.#stageMs[this.#stage] = now - this.#since;
    this.#stage = stage;
    this.#since = now;
    void this.control.send({ type: 'stage', stage });
  }

  /** Bytes of weights loaded so far, told now and then. */
  progress(done: number, total: number): void {
    const now = performance.now();
    if (done < total && now - this.#toldAt < PROGRESS_MS) return;
    this.#toldAt = now;
    void this.control.send({ type: 'progress', done, total });
  }

  /** Open for jobs. */
  async ready(resident: Omit<ReadyInfo, 'stageMs'>): Promise<void> {
    this.enter('ready');
    const body: ReadyInfo = { ...resident, stageMs: this.#stageMs };
    await this.control.send({ type: 'ready', body });
  }

  /** Runs one job and tells its steps and its result. */
  async work(job: Job, run: RunJob): Promise<void> {
    const result = await run(job, async (report) => {
      const { body, frames } = packReport(report);
      await this.control.send({ type: 'report', frames: frames.length, body }, frames);
      this.#step = report.step;
    });
    await this.control.send({ type: 'result', body: result });
  }

  /** Tells a launcher that has waited too long what this rank waits for itself, and what its collective complains of. */
  async answer(pending: { op: string; partner: number } | null, asyncError: string): Promise<void> {
    const doing = pending
      ? `waits for rank ${pending.partner} in ${pending.op}`
      : `computes step ${this.#step + 1}`;
    await this.control.send({
      type: 'at',
      doing,
      waitsFor: pending?.partner ?? null,
      collectives: this.recorder.entries(),
      asyncError,
    });
  }

  /** From now on the end of this rank speaks for itself. */
  hush(): void {
    this.#hushed = true;
  }

  /** Tells what ended this rank, and gives the exit code that goes with it. */
  async lastWords(error: unknown, asyncError: string): Promise<number> {
    const words = describeError(error);
    if (this.#hushed) return words.exitCode;
    // what is wrong with the input is said once, by the launcher
    if (words.exitCode !== EXIT.input) log.error(`${words.code}: ${words.text}`);
    const collectives = this.recorder.entries();
    await this.control.send({
      type: 'error',
      ...words,
      stage: this.#stage,
      step: this.#step,
      collectives,
      asyncError,
    });
    return words.exitCode;
  }
}
