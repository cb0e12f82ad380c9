// The decode loop of one rank. Every rank runs the same loop on the same job: what a step holds follows from the job
// and the tokens so far, so nobody has to be told what comes next. All that crosses ranks is the plan's sync points.

import type { Collective } from '../comm/collective.js';
import type { Plan } from '../model/plan.js';
import { type Batch, fromNative, type NativeEngine, type NativeStep } from '../native.js';
import { benchAllReduce } from './bench-allreduce.js';
import type {
  GenerateJob,
  Job,
  JobResult,
  PlantedFault,
  RowReport,
  RunSpec,
  Sampling,
  ScoreJob,
  SequenceSpec,
  StepReport,
} from './job.js';

/** Runs one job on this rank; a report for every step of a generate or score job. */
export async function runJob(
  engine: NativeEngine,
  collective: Collective,
  plan: Plan,
  spec: RunSpec,
  job: Job,
  report: Report,
): Promise<JobResult> {
  switch (job.kind) {
    case 'generate':
    case 'score': {
      const { rank, steps } = plan;
      const decoder = { rank, engine, collective, steps, limits: spec.limits, trace: spec.trace };
      return { kind: job.kind, steps: await decode(decoder, job, report) };
    }
    case 'read-bandwidth':
      return { kind: job.kind, gbPerS: await engine.readBandwidth(job.seconds) };
    case 'allreduce':
      return benchAllReduce(collective, plan, job);
  }
}

/** What a rank decodes with. */
export interface Decoder {
  rank: number;
  engine: NativeEngine;
  collective: Collective;
  /** The plan's steps: their sync points are done here. */
  steps: readonly NativeStep[];
  limits: RunSpec['limits'];
  trace: boolean;
}

type Report = (report: StepReport) => Promise<void> | void;

/** A sequence in a KV-cache slot. */
interface Active {
  spec: SequenceSpec;
  slot: number;
  /** Prompt, then generated tokens. */
  tokens: number[];
  /** Tokens already in the cache. */
  cached: number;
  finished: boolean;
}

/** One row that a step was asked for. */
interface WantedRow {
  sequence: Active;
  position: number;
}

const GREEDY: Sampling = { temperature: 0, topK: 0, topP: 1, seed: 0 };

/** Runs a job to its end; one report a step. Returns the number of steps. */
export async function decode(decoder: Decoder, job: GenerateJob | ScoreJob, report: Report): Promise<number> {
  const waiting = job.sequences.filter((s) => job.kind === 'score' || s.maxTokens > 0);
  const slots: (Active | null)[] = Array(decoder.limits.sequences).fill(null);
  let step = 0;
  let last = performance.now();
  for (;;) {
    for (const [slot, sequence] of slots.entries()) {
      if (sequence && !sequence.finished) continue;
      if (sequence && sequence.spec.sequence === job.fault?.sequence) decoder.engine.plantFault(null);
      slots[slot] = waiting.length > 0 ? admit(decoder, waiting.shift()!, slot, job.fault) : null;
    }
    const active = slots.filter((s) => s !== null);
    if (active.length === 0) return step;
    const { batch, rows, tokens, kind } = nextBatch(decoder.limits, active, job);

    const time = await runStep(decoder, batch);
    const reports = rows.map((row, r): RowReport => finishRow(decoder, job, row, r));
    for (const sequence of active) {
      sequence.cached += tokens.filter((t) => t.sequence === sequence.spec.sequence).length;
      if (job.kind === 'score') sequence.finished = sequence.cached === sequence.tokens.length;
    }

    const now = performance.now();
    const { readBytes, expertsRead } = decoder.engine.stats();
    await report({
      step: step++,
      kind,
      tokens,
      rows: reports,
      time: { ...time, hostMs: now - last - time.computeMs - time.syncMs },
      readBytes,
      expertsRead,
      logits: job.keepLogits ? decoder.engine.logits() : null,
      trace: decoder.trace ? decoder.engine.trace() : null,
    });
    last = now;
  }
}

function admit(decoder: Decoder, spec: SequenceSpec, slot: number, fault: PlantedFault | null): Active {
  if (fault && fault.sequence === spec.sequence && (fault.rank === decoder.rank || fault.rank < 0))
    decoder.engine.plantFault({ stage: fault.stage, layer: fault.layer, position: fault.position, slot });
  return { spec, slot, tokens: [...spec.promptIds], cached: 0, finished: false };
}

/**
 * The tokens of the next step. Prompts go first, in chunks of `limits.tokens` that several sequences may share;
 * when none is left, every active sequence decodes one token.
 */
function nextBatch(limits: RunSpec['limits'], active: Active[], job: GenerateJob | ScoreJob) {
  const prefilling = active.filter((s) => s.cached < s.spec.promptIds.length);
  const kind: StepReport['kind'] = prefilling.length > 0 ? 'prefill' : 'decode';
  const sampling = job.kind === 'generate' ? job.sampling : GREEDY;
  const tokens: { sequence: number; position: number }[] = [];
  const ids: number[] = [];
  const slots: number[] = [];
  const rows: WantedRow[] = [];
  const rowIndex: number[] = [];
  const targets: number[] = [];
  for (const sequence of kind === 'prefill' ? prefilling : active) {
    const end = sequence.tokens.length;
    for (let p = sequence.cached; p < end && tokens.length < limits.tokens; p++) {
      const wanted = job.kind === 'score' || p === end - 1;
      if (wanted && rows.length === limits.rows) break;
      if (wanted) {
        rows.push({ sequence, position: p });
        rowIndex.push(tokens.length);
        targets.push(job.kind === 'score' ? (sequence.tokens[p + 1] ?? -1) : -1);
      }
      ids.push(sequence.tokens[p]!);
      slots.push(sequence.slot);
      tokens.push({ sequence: sequence.spec.sequence, position: p });
    }
  }
  const batch: Batch = {
    tokens: Int32Array.from(ids),
    positions: Int32Array.from(tokens, (t) => t.position),
    slots: Int32Array.from(slots),
    rows: Int32Array.from(rowIndex),
    targets: Int32Array.from(targets),
    temperature: new Float32Array(rows.length).fill(sampling.temperature),
    topK: new Int32Array(rows.length).fill(sampling.topK),
    topP: new Float32Array(rows.length).fill(sampling.topP),
    seed: new Uint32Array(rows.length).fill(sampling.seed),
    sequence: Int32Array.from(rows, (r) => r.sequence.spec.sequence),
  };
  return { batch, rows, tokens, kind };
}

/** Runs the whole plan on one batch: native code up to a sync point, the collective there, on. */
async function runStep(decoder: Decoder, batch: Batch): Promise<{ computeMs: number; syncMs: number }> {
  const { engine, collective, steps } = decoder;
  const time = { computeMs: 0, syncMs: 0 };
  try {
    engine.begin(batch);
    for (let at = 0; ; at++) {
      const start = performance.now();
      at = await engine.run(at);
      const computed = performance.now();
      time.computeMs += computed - start;
      if (at === steps.length) return time;
      const { send, gathered } = engine.syncBuffers(at);
      if (gathered) await collective.gather(send, gathered);
      else await collective.allReduce(send);
      time.syncMs += performance.now() - computed;
    }
  } catch (error) {
    throw fromNative(error);
  }
}

/** Takes the result of row `r`: extends the sequence (generate) or scores its next token (score). */
function finishRow(decoder: Decoder, job: GenerateJob | ScoreJob, row: WantedRow, r: number): RowReport {
  const { tokens, logprobs, targetLogprobs } = decoder.engine.result();
  const { sequence, position } = row;
  const key = { sequence: sequence.spec.sequence, position };
  if (job.kind === 'score') {
    const target = targetLogprobs[r]!;
    return {
      ...key,
      token: -1,
      logprob: 0,
      targetLogprob: Number.isNaN(target) ? null : target,
      finish: null,
    };
  }
  const token = tokens[r]!;
  sequence.tokens.push(token);
  const generated = sequence.tokens.length - sequence.spec.promptIds.length;
  const finish = job.stopTokenIds.includes(token)
    ? 'stop'
    : generated === sequence.spec.maxTokens
      ? 'length'
      : null;
  sequence.finished = finish !== null;
  return { ...key, token, logprob: logprobs[r]!, targetLogprob: null, finish };
}
