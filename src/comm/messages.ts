// What launcher and workers may say to each other: a closed union, checked on arrival. msgpack carries the words;
// big arrays follow as raw frames of the same multipart message. Numbers in words are doubles, but -0 arrives as 0.

import { addExtension, Packr, Unpackr } from 'msgpackr';
import { z } from 'zod';
import { fail, TpError } from '../errors.js';
import { MOST_RECORDED } from './flight-recorder.js';

export const PROTOCOL = 1;

/** Longest frame accepted from a socket, in bytes: a step's logits at the largest vocabulary fit well within. */
export const MAX_FRAME_BYTES = 1 << 30;

/** A worker's way to its first job, in order. */
export const STAGES = [
  'spawn',
  'addon',
  'connect',
  'device',
  'collective',
  'weights',
  'warm-up',
  'ready',
] as const;
export type Stage = (typeof STAGES)[number];

const count = z.number().int().nonnegative();
const stage = z.enum(STAGES);
/** `body` is what the engine's own schemas describe; this room only carries it. */
const body = z.unknown();
/** Endpoints by rank. */
const endpoints = z.record(z.string().regex(/^\d+$/), z.string());

/** Stands in every message; the channel adds it. */
export const head = { v: z.literal(PROTOCOL), run: z.string() };

/** The last collectives of a rank, see flight-recorder.ts. */
const collectives = z
  .array(
    z.strictObject({
      place: count,
      n: count.nullable(),
      op: z.string(),
      layer: z.number().int(),
      stage: z.string(),
      bytes: count,
      agoMs: z.number(),
      tookMs: z.number().nullable(),
    }),
  )
  .max(MOST_RECORDED);
/** What the device collective says went wrong behind the back of its calls; '' = nothing. */
const asyncError = z.string();

const WORKER = z.discriminatedUnion('type', [
  z.strictObject({
    ...head,
    type: z.literal('hello'),
    rank: count,
    pid: count,
    host: z.string(),
    version: z.string(),
    endpoints,
  }),
  z.strictObject({ ...head, type: z.literal('stage'), stage }),
  z.strictObject({ ...head, type: z.literal('progress'), done: count, total: count }),
  z.strictObject({ ...head, type: z.literal('ready'), body }),
  z.strictObject({ ...head, type: z.literal('report'), frames: count.max(4096), body }),
  z.strictObject({ ...head, type: z.literal('result'), body }),
  /** answers `where` */
  z.strictObject({
    ...head,
    type: z.literal('at'),
    doing: z.string(),
    waitsFor: count.nullable(),
    collectives,
    asyncError,
  }),
  z.strictObject({
    ...head,
    type: z.literal('error'),
    code: z.string(),
    text: z.string(),
    exitCode: count,
    stage,
    step: z.number().int(),
    collectives,
    asyncError,
  }),
]);

const LAUNCHER = z.discriminatedUnion('type', [
  z.strictObject({ ...head, type: z.literal('setup'), peers: endpoints, body }),
  z.strictObject({ ...head, type: z.literal('job'), body }),
  /** asks a silent worker what it does */
  z.strictObject({ ...head, type: z.literal('where') }),
  z.strictObject({ ...head, type: z.literal('stop') }),
]);

/** A message as its sender writes it. */
export type Words<M> = M extends unknown ? Omit<M, 'v' | 'run'> : never;
/** From a worker to the launcher, without the version and run id that the channel adds. */
export type WorkerMessage = Words<z.infer<typeof WORKER>>;
/** From the launcher to a worker. */
export type LauncherMessage = Words<z.infer<typeof LAUNCHER>>;

const refuse = (type: number) => ({
  type,
  unpack: () => {
    throw new Error(`msgpack extension 0x${type.toString(16)}`);
  },
});
// undefined, BigInt, bundled strings, Error, id, pointer, Set, typed array, RegExp, Date: msgpackr decodes them unasked.
for (const type of [0x00, 0x42, 0x62, 0x65, 0x69, 0x70, 0x73, 0x74, 0x78, 0xff]) addExtension(refuse(type));

const options = {
  useRecords: false,
  structuredClone: false,
  moreTypes: false,
  mapsAsObjects: true,
  variableMapSize: true,
} as const;
const packr = new Packr(options);
const structures: object[] = [];
const unpackr = new Unpackr({ ...options, structures });
// msgpackr reads record definitions although records are off; with nowhere to keep them it throws
Object.freeze(structures);

/** The words of one message as bytes, with this protocol's version and the run's id. */
export function encode(run: string, message: object): Buffer {
  return packr.pack({ v: PROTOCOL, run, ...message });
}

/** A worker's message. `from` names the sender in TP_MESSAGE_BAD and TP_PROTOCOL. */
export function decodeWorker(run: string, bytes: Uint8Array, from: string): WorkerMessage {
  return decode(WORKER, run, bytes, from);
}

/** The launcher's message; errors as `decodeWorker`. */
export function decodeLauncher(run: string, bytes: Uint8Array): LauncherMessage {
  return decode(LAUNCHER, run, bytes, 'the launcher');
}

/** Checks one message against the union that `from` may speak; `run` null takes any run's. TP_MESSAGE_BAD, TP_PROTOCOL. */
export function decode<T extends { run: string }>(
  schema: z.ZodType<T>,
  run: string | null,
  bytes: Uint8Array,
  from: string,
): T {
  let words: unknown;
  try {
    words = unpackr.unpack(bytes);
  } catch (error) {
    throw fail(
      'TP_MESSAGE_BAD',
      from,
      `not msgpack (${error instanceof Error ? error.message : String(error)})`,
    );
  }
  const version = (words as { v?: unknown } | null | undefined)?.v;
  if (typeof version === 'number' && version !== PROTOCOL) {
    throw fail('TP_PROTOCOL', from, String(version), PROTOCOL);
  }
  const checked = schema.safeParse(words);
  if (!checked.success) {
    const issue = checked.error.issues[0]!;
    throw fail('TP_MESSAGE_BAD', from, `${issue.path.join('.') || 'message'}: ${issue.message}`);
  }
  if (run !== null && checked.data.run !== run) {
    throw fail('TP_MESSAGE_BAD', from, `it belongs to run ${checked.data.run}, not to ${run}`);
  }
  return checked.data;
}

/** Parses a `body` with the schema of the room it belongs to; TP_MESSAGE_BAD. */
export function parseBody<T>(schema: z.ZodType<T>, value: unknown, from: string): T {
  const checked = schema.safeParse(value);
  if (checked.success) return checked.data;
  const issue = checked.error.issues[0]!;
  throw fail('TP_MESSAGE_BAD', from, `${issue.path.join('.') || 'body'}: ${issue.message}`);
}

/** What an error message carries of any thrown value. */
export function describeError(error: unknown): { code: string; text: string; exitCode: number } {
  if (error instanceof TpError) return { code: error.code, text: error.text, exitCode: error.exitCode };
  return describeError(
    fail('TP_INTERNAL', error instanceof Error ? (error.stack ?? error.message) : String(error)),
  );
}
