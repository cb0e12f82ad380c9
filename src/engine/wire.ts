// Specs, jobs and reports as they cross processes: schemas for the words, frames for the big arrays.
// The types are job.ts's own; a field added there that is missing here does not compile.

import { z } from 'zod';
import type { RankKeys } from '../comm/curve.js';
import { parseBody } from '../comm/messages.js';
import { fail } from '../errors.js';
import type { TraceEntry } from '../native.js';
import type { StepTimes } from '../report/stages.js';
import type { Job, JobResult, ModelSource, RunSpec, StepReport } from './job.js';

const count = z.number().int().nonnegative();
const ids = z.array(z.number().int());
/** z.number() refuses NaN and infinities, which a log-probability or a time may be. */
const real = z.custom<number>((value) => typeof value === 'number', 'expected a number');

/** What travels of a spec: no file is named to a process on another host. */
export type SentSpec = Omit<RunSpec, 'model' | 'logDir'>;
const spec: z.ZodType<SentSpec> = z.strictObject({
  ranks: count.positive(),
  device: z.enum(['cpu', 'cuda']),
  devices: z.array(count),
  dtype: z.enum(['bfloat16', 'float32']),
  collective: z.enum(['auto', 'peer', 'nccl', 'zmq']),
  isa: z.enum(['auto', 'generic', 'avx2', 'avx512']),
  threads: count,
  limits: z.strictObject({
    tokens: count,
    rows: count,
    sequences: count,
    positions: count,
    candidates: count,
  }),
  trace: z.boolean(),
  eager: z.boolean(),
  initTimeoutMs: real,
  stepTimeoutMs: real,
});

/** What a worker reads from stdin, written by the process that started it: files, and keys that nobody else may see. */
export interface Briefing {
  model: ModelSource;
  /** Null = plain sockets. */
  keys: RankKeys | null;
  /** Address of this host that the rank binds its sockets to; null = beside the launcher's ipc socket. */
  address: string | null;
}
const keyPair = z.strictObject({ publicKey: z.string(), secretKey: z.string() });
const briefing: z.ZodType<Briefing> = z.strictObject({
  model: z.discriminatedUnion('kind', [
    z.strictObject({ kind: z.literal('checkpoint'), dir: z.string() }),
    z.strictObject({ kind: z.literal('synthetic'), file: z.string(), seed: count }),
  ]),
  keys: z.strictObject({ own: keyPair, launcher: z.string(), ranks: z.array(z.string()) }).nullable(),
  address: z.string().nullable(),
});

/** What the launcher tells a worker that has said hello. */
export interface Setup {
  spec: SentSpec;
  collective: 'local' | 'zmq' | 'nccl' | 'peer';
}
const setup: z.ZodType<Setup> = z.strictObject({
  spec,
  collective: z.enum(['local', 'zmq', 'nccl', 'peer']),
});

const sequences = z.array(
  z.strictObject({
    promptIds: ids,
    maxTokens: count,
    sequence: count,
    replay: count.optional(),
    filled: count.optional(),
  }),
);
const fault = z
  .strictObject({
    rank: z.number().int(),
    sequence: count,
    stage: z.string(),
    layer: z.number().int(),
    position: count,
  })
  .nullable();
const job: z.ZodType<Job> = z.discriminatedUnion('kind', [
  z.strictObject({
    kind: z.literal('generate'),
    sequences,
    sampling: z.strictObject({ temperature: real, topK: count, topP: real, seed: count }),
    stopTokenIds: ids,
    keepLogits: z.boolean(),
    timeStages: z.boolean().optional(),
    fault,
  }),
  z.strictObject({ kind: z.literal('score'), sequences, keepLogits: z.boolean(), fault }),
  z.strictObject({
    kind: z.literal('allreduce'),
    floats: z.array(count),
    warmup: count,
    iterations: count,
  }),
  z.strictObject({ kind: z.literal('read-bandwidth'), seconds: real }),
]);

const result: z.ZodType<JobResult> = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.enum(['generate', 'score']), steps: count }),
  z.strictObject({
    kind: z.literal('allreduce'),
    sizes: z.array(
      z.strictObject({
        floats: count,
        launch: z.enum(['host', 'stream', 'graph']),
        timesUs: z.array(real),
        wrong: count,
      }),
    ),
  }),
  z.strictObject({ kind: z.literal('read-bandwidth'), gbPerS: real }),
]);

/** What a rank says when it is ready for jobs. */
export interface ReadyInfo {
  weightBytes: number;
  cacheBytes: number;
  /** Milliseconds that each stage took. */
  stageMs: Record<string, number>;
}
const ready: z.ZodType<ReadyInfo> = z.strictObject({
  weightBytes: count,
  cacheBytes: count,
  stageMs: z.record(z.string(), real),
});

const token = z.strictObject({ sequence: count, position: count });
const report = z.strictObject({
  step: count,
  kind: z.enum(['prefill', 'decode']),
  tokens: z.array(token),
  rows: z.array(
    z.strictObject({
      sequence: count,
      position: count,
      token: z.number().int(),
      logprob: real,
      targetLogprob: real.nullable(),
      finish: z.enum(['length', 'stop']).nullable(),
    }),
  ),
  time: z.strictObject({ computeMs: real, syncMs: real, hostMs: real }),
  readBytes: real,
  expertsRead: real,
  /** true: the first frame holds them */
  logits: z.boolean(),
  /** the next frame holds the hashes of all entries, one entry after another */
  trace: z
    .array(
      z.strictObject({
        stage: z.string(),
        layer: z.number().int(),
        parts: count,
        sharded: z.boolean(),
        hashes: count,
      }),
    )
    .nullable(),
  /** the last frame holds spans, bytes and marks, one behind the other */
  times: z.strictObject({ begin: real, end: real, steps: count, blocks: ids }).nullable(),
});

/** TP_MESSAGE_BAD. */
export const parseBriefing = (text: string): Briefing =>
  parseBody(briefing, JSON.parse(text), 'the process that started this one');
/** What of `spec` every rank is told, on any host. */
export const sentSpec = ({ model: _, logDir: __, ...sent }: RunSpec): SentSpec => sent;

export const parseSetup = (body: unknown): Setup => parseBody(setup, body, 'the launcher');
export const parseJob = (body: unknown): Job => parseBody(job, body, 'the launcher');
export const parseReady = (body: unknown, rank: number): ReadyInfo => parseBody(ready, body, `rank ${rank}`);
export const parseResult = (body: unknown, rank: number): JobResult =>
  parseBody(result, body, `rank ${rank}`);

/** Splits a report into its words and its raw frames (no copies of the logits). */
export function packReport(said: StepReport): { body: unknown; frames: Uint8Array[] } {
  const { times } = said;
  const frames = [said.logits, said.trace && joinHashes(said.trace), times && joinTimes(times)].filter(
    (array) => array !== null,
  );
  const body: z.infer<typeof report> = {
    ...said,
    logits: said.logits !== null,
    trace: said.trace?.map((entry) => ({ ...entry, hashes: entry.hashes.length })) ?? null,
    times: times && {
      begin: times.begin,
      end: times.end,
      steps: times.bytes.length,
      blocks: [...times.blocks],
    },
  };
  return { body, frames: frames.map((a) => new Uint8Array(a.buffer, a.byteOffset, a.byteLength)) };
}

/** The inverse of packReport; TP_MESSAGE_BAD. */
export function unpackReport(body: unknown, frames: readonly Uint8Array[], rank: number): StepReport {
  const from = `rank ${rank}`;
  const said = parseBody(report, body, from);
  const expected = Number(said.logits) + Number(said.trace !== null) + Number(said.times !== null);
  if (frames.length !== expected) {
    throw fail('TP_MESSAGE_BAD', from, `report with ${frames.length} frames, not ${expected}`);
  }
  const logits = said.logits ? new Float32Array(aligned(frames[0]!, 4, from)) : null;
  const trace = said.trace && splitHashes(said.trace, aligned(frames[Number(said.logits)]!, 8, from), from);
  const times = said.times && splitTimes(said.times, aligned(frames.at(-1)!, 8, from), from);
  return { ...said, logits, trace, times };
}

function joinTimes({ spans, bytes, marks }: StepTimes): Float64Array {
  return Float64Array.from([...spans, ...bytes, ...marks]);
}

function splitTimes(
  { begin, end, steps, blocks }: NonNullable<z.infer<typeof report>['times']>,
  bytes: ArrayBuffer,
  from: string,
): StepTimes {
  const all = new Float64Array(bytes);
  const expected = steps * (4 + 3 * blocks.length);
  if (all.length !== expected) throw fail('TP_MESSAGE_BAD', from, `${all.length} times, not ${expected}`);
  return {
    begin,
    end,
    spans: all.subarray(0, 3 * steps),
    bytes: all.subarray(3 * steps, 4 * steps),
    blocks: Int32Array.from(blocks),
    marks: all.subarray(4 * steps),
  };
}

function joinHashes(trace: readonly TraceEntry[]): BigUint64Array {
  const all = new BigUint64Array(trace.reduce((n, entry) => n + entry.hashes.length, 0));
  let at = 0;
  for (const { hashes } of trace) {
    all.set(hashes, at);
    at += hashes.length;
  }
  return all;
}

function splitHashes(
  entries: NonNullable<z.infer<typeof report>['trace']>,
  bytes: ArrayBuffer,
  from: string,
): TraceEntry[] {
  const all = new BigUint64Array(bytes);
  const total = entries.reduce((n, entry) => n + entry.hashes, 0);
  if (total !== all.length) throw fail('TP_MESSAGE_BAD', from, `${all.length} trace hashes, not ${total}`);
  let at = 0;
  return entries.map((entry) => {
    const hashes = all.subarray(at, at + entry.hashes);
    at += entry.hashes;
    return { ...entry, hashes };
  });
}

/** A copy at an aligned address: a frame may lie anywhere. */
function aligned(frame: Uint8Array, unit: number, from: string): ArrayBuffer {
  if (frame.byteLength % unit) {
    throw fail('TP_MESSAGE_BAD', from, `a frame of ${frame.byteLength} bytes, no multiple of ${unit}`);
  }
  const copy = new Uint8Array(frame.byteLength);
  copy.set(frame);
  return copy.buffer;
}
