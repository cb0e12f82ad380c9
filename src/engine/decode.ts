// The decode loop of one rank. Every rank runs the same loop on the same job: what a step holds follows from the job
// and the tokens so far, so nobody has to be told what comes next. All that crosses ranks is the plan's sync points.

import type { Collective } from '../comm/collective.js';
import type { FlightRecorder } from '../comm/flight-recorder.js';
import { type Batch, fromNative, type NativeEngine, type NativeStep } from '../native.js';
import type { StepTimes } from '../report/stages.js';
import { type Active, finishRow, nextBatch, type WantedRow } from './batching.js';
import { benchAllReduce } from './bench-allreduce.js';
import type {
  GenerateJob,
  Job,
  JobResult,
  PlantedFault,
  RunSpec,
  ScoreJob,
  SequenceSpec,
  StepReport,
} from './job.js';
import { type Outcome, Pace } from './pace.js';

/** Runs one job on this rank; a report for every step of a generate or score job. */
export async function runJob(decoder: Decoder, job: Job, report: Report): Promise<JobResult> {
  switch (job.kind) {
    case 'generate':
    case 'score':
      return { kind: job.kind, steps: await decode(decoder, job, report) };
    case 'read-bandwidth':
      return { kind: job.kind, gbPerS: await decoder.engine.readBandwidth(job.seconds) };
    case 'allreduce':
      return benchAllReduce(decoder, job);
  }
}

/** What a rank decodes with. */
export interface Decoder {
  rank: number;
  size: number;
  engine: NativeEngine;
  collective: Collective;
  /** Remembers the last collectives. */
  recorder: FlightRecorder;
  /** The plan's steps: their sync points are done here. */
  steps: readonly NativeStep[];
  limits: RunSpec['limits'];
  trace: boolean;
  /** The collective stays on the device, so decode steps can follow each other without the host. */
  bursts: boolean;
  /** The run's collective is `peer` or `nccl`: `collective` only carries what the host has to say. */
  onDevice: boolean;
}

type Report = (report: StepReport) => Promise<void> | void;

/** A step's outcome, and where its time went if the job wants to know. */
interface TimedOutcome extends Outcome {
  times: StepTimes | null;
}

function timesStages(job: GenerateJob | ScoreJob): boolean {
  return job.kind === 'generate' && job.timeStages === true;
}

/** Runs a job to its end; one report a step. Returns the number of steps. */
export async function decode(decoder: Decoder, job: GenerateJob | ScoreJob, report: Report): Promise<number> {
  if (!timesStages(job)) return runSteps(decoder, job, report);
  await decoder.engine.timeStages(true);
  const steps = await runSteps(decoder, job, report);
  await decoder.engine.timeStages(false);
  return steps;
}

async function runSteps(decoder: Decoder, job: GenerateJob | ScoreJob, report: Report): Promise<number> {
  const waiting = job.sequences.filter((s) => job.kind === 'score' || s.maxTokens > 0);
  const slots: (Active | null)[] = Array(decoder.limits.sequences).fill(null);
  const pace = new Pace((length) => smallestOf(decoder, length));
  let step = 0;
  let last = performance.now();
  for (;;) {
    for (const [slot, sequence] of slots.entries()) {
      if (sequence && !sequence.finished) continue;
      if (sequence && sequence.spec.sequence === job.fault?.sequence) decoder.engine.plantFault(null);
      slots[slot] = waiting.length > 0 ? await admit(decoder, waiting.shift()!, slot, job.fault) : null;
    }
    const active = slots.filter((s) => s !== null);
    if (active.length === 0) return step;

    const first = nextBatch(decoder.limits, active, job);
    const inBursts = mayBurst(decoder, job, first.kind);
    const burst = inBursts ? pace.steps(active) : 1;
    const outcomes =
      burst > 1
        ? await runBurst(decoder, first.batch, burst)
        : [await runStep(decoder, first.batch, timesStages(job))];
    if (inBursts) await pace.took(outcomes, active.length);
    const { readBytes, expertsRead } = decoder.engine.stats();

    for (const [k, { result, time, times }] of outcomes.entries()) {
      // In a burst the next step follows from what this one sampled; a sequence that has ended has no part in it.
      const going = active.filter((s) => !s.finished);
      if (k > 0 && going.length === 0) break;
      const { rows, tokens, kind } = k === 0 ? first : nextBatch(decoder.limits, going, job);
      const rowOf = (wanted: WantedRow) => first.rows.findIndex((row) => row.sequence === wanted.sequence);
      const reports = rows.map((row, r) => finishRow(job, row, result, k === 0 ? r : rowOf(row)));
      for (const sequence of active) {
        sequence.cached += tokens.filter((t) => t.sequence === sequence.spec.sequence).length;
        if (job.kind === 'score') sequence.finished = sequence.cached === sequence.tokens.length;
      }
      const now = performance.now();
      const hostMs =
        k === 0
          ? Math.max(0, now - last - outcomes.reduce((ms, o) => ms + o.time.computeMs + o.time.syncMs, 0))
          : 0;
      await report({
        step: step++,
        kind,
        tokens,
        rows: reports,
        time: { ...time, hostMs },
        readBytes: readBytes / outcomes.length,
        expertsRead: expertsRead / outcomes.length,
        logits: job.keepLogits ? decoder.engine.logits() : null,
        trace: decoder.trace ? decoder.engine.trace() : null,
        times,
      });
    }
    last = performance.now();
  }
}

/** Steps can follow each other on the device when nobody wants to see what is between them. */
function mayBurst(decoder: Decoder, job: GenerateJob | ScoreJob, kind: StepReport['kind']): boolean {
  const watched = decoder.trace || job.keepLogits || timesStages(job) || job.fault !== null;
  return decoder.bursts && kind === 'decode' && !watched;
}

async function admit(
  decoder: Decoder,
  spec: SequenceSpec,
  slot: number,
  fault: PlantedFault | null,
): Promise<Active> {
  const cached = spec.filled ?? 0;
  if (cached > 0) await decoder.engine.fillCache(slot);
  if (fault && fault.sequence === spec.sequence && (fault.rank === decoder.rank || fault.rank < 0))
    decoder.engine.plantFault({ stage: fault.stage, layer: fault.layer, position: fault.position, slot });
  return { spec, slot, tokens: [...spec.promptIds], cached, finished: false };
}

/** Runs the whole plan on one batch: native code up to a sync point, the collective there, on. */
async function runStep(decoder: Decoder, batch: Batch, timed: boolean): Promise<TimedOutcome> {
  const { engine, collective, recorder, steps } = decoder;
  const time = { computeMs: 0, syncMs: 0 };
  const clock = timed ? hostNs : () => 0;
  const syncs: { at: number; span: number[] }[] = [];
  const begin = clock();
  try {
    engine.begin(batch);
    for (let at = 0; ; at++) {
      const start = performance.now();
      at = await engine.run(at);
      const computed = performance.now();
      time.computeMs += computed - start;
      if (at === steps.length) {
        const result = engine.result();
        if (!timed) return { result, time, times: null };
        const times = { begin, end: clock(), ...engine.stageTimes() };
        for (const { at, span } of syncs) times.spans.set(span, 3 * at);
        return { result, time, times };
      }
      const { send, gathered } = engine.syncBuffers(at);
      const { op, layer, stage } = steps[at]!;
      const done = recorder.begin(op, layer, stage, send.byteLength, collective.next);
      const began = clock(); // it has its inputs when it begins
      if (gathered) await collective.gather(send, gathered);
      else await collective.allReduce(send);
      done();
      time.syncMs += performance.now() - computed;
      if (timed) syncs.push({ at, span: [began, began, clock()] });
    }
  } catch (error) {
    throw fromNative(error);
  }
}

/** The clock that the engine's times are of, in ns: exact for the first hundred days of a host's uptime. */
function hostNs(): number {
  return Number(process.hrtime.bigint());
}

/** Runs `steps` decode steps without the host; each is timed from the end of the one before it, on the device's clock. */
async function runBurst({ engine, recorder }: Decoder, batch: Batch, steps: number): Promise<TimedOutcome[]> {
  try {
    const done = recorder.begin(`${steps} steps`, -1, 'on the device', 0, null);
    const start = performance.now();
    engine.begin(batch);
    const { tokens, logprobs, endMs } = await engine.decode(steps);
    done();
    const firstMs = performance.now() - start - (endMs.at(-1)! - endMs[0]!);
    const rows = tokens.length / steps;
    return Array.from({ length: steps }, (_, k) => ({
      result: {
        tokens: tokens.subarray(k * rows, (k + 1) * rows),
        logprobs: logprobs.subarray(k * rows, (k + 1) * rows),
        targetLogprobs: new Float32Array(rows).fill(Number.NaN),
      },
      time: { computeMs: k === 0 ? firstMs : endMs[k]! - endMs[k - 1]!, syncMs: 0 },
      times: null,
    }));
  } catch (error) {
    throw fromNative(error);
  }
}

/** The smallest of the ranks' numbers, the same on all: by the host's collective, which is there beside that of the GPUs. */
async function smallestOf({ collective, recorder, size }: Decoder, mine: number): Promise<number> {
  const all = new Float32Array(size);
  const done = recorder.begin('gather', -1, 'burst length', 4, collective.next);
  await collective.gather(Float32Array.of(mine), all);
  done();
  return Math.min(...all);
}
