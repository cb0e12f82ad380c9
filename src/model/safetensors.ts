// Reading the safetensors format, strictly: 8 bytes of header length, a JSON header, then the tensors without a gap.
// Files come from anywhere, so every number is checked before it is used; the descriptor that was checked is the one
// that is read, and `requireUnchanged` tells afterwards whether the file stayed the same meanwhile.

import { type BigIntStats, closeSync, constants, fstatSync, openSync, readSync, statSync } from 'node:fs';
import { fail, shown } from '../errors.js';
import { isObject, parseJson } from './json.js';

/** Bytes of one element. A dtype that is not listed is refused. */
export const DTYPE_BYTES = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  U16: 2,
  I16: 2,
  F16: 2,
  BF16: 2,
  U32: 4,
  I32: 4,
  F32: 4,
  U64: 8,
  I64: 8,
  F64: 8,
} as const;
export type StoredDtype = keyof typeof DTYPE_BYTES;

/** Most bytes of a header, the limit of the reference implementation. */
const MAX_HEADER = 100_000_000;
const MAX_TENSORS = 100_000;
const MAX_RANK = 16;

/** Where a tensor lies in its file. */
export interface StoredTensor {
  dtype: StoredDtype;
  shape: readonly number[];
  /** First byte, from the start of the file. */
  offset: number;
  bytes: number;
}

/** An open, validated safetensors file. */
export class SafetensorsFile {
  readonly path: string;
  /** Stays open until `close`. */
  readonly fd: number;
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly #stat: BigIntStats;

  /** Opens and validates. TP_FILE_UNREADABLE, TP_SAFETENSORS. */
  constructor(path: string) {
    this.path = path;
    this.fd = open(path);
    try {
      this.#stat = fstatSync(this.fd, { bigint: true });
      const header = readHeader(this.fd, this.#stat);
      this.metadata = metadataOf(header.json);
      this.tensors = tensorsOf(header.json, header.end, Number(this.#stat.size));
    } catch (error) {
      closeSync(this.fd);
      throw error instanceof Malformed ? fail('TP_SAFETENSORS', path, error.message) : error;
    }
  }

  /** A copy of a tensor's bytes. TP_FILE_CHANGED when they are no longer there. */
  read(name: string): Buffer {
    const { offset, bytes } = this.tensors.get(name)!;
    const buffer = Buffer.alloc(bytes);
    if (readFully(this.fd, buffer, offset) < bytes)
      throw fail('TP_FILE_CHANGED', this.path, 'it became shorter');
    return buffer;
  }

  /** Call after the last read. TP_FILE_CHANGED when the file was written to, replaced or removed since it was opened. */
  requireUnchanged(): void {
    const before = this.#stat;
    const now = fstatSync(this.fd, { bigint: true });
    const named = statSync(this.path, { bigint: true, throwIfNoEntry: false });
    const why = !named
      ? 'it was removed'
      : named.ino !== before.ino || named.dev !== before.dev
        ? 'another file took its place'
        : now.size !== before.size || now.mtimeNs !== before.mtimeNs
          ? 'it was written to'
          : null;
    if (why) throw fail('TP_FILE_CHANGED', this.path, why);
  }

  close(): void {
    closeSync(this.fd);
  }
}

/** A rule of the format that a file breaks. */
class Malformed extends Error {}

function open(path: string): number {
  try {
    // Without O_NONBLOCK a named pipe would hold us here for ever.
    const fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    if (fstatSync(fd).isFile()) return fd;
    closeSync(fd);
  } catch (error) {
    throw fail('TP_FILE_UNREADABLE', path, (error as Error).message);
  }
  throw fail('TP_FILE_UNREADABLE', path, 'it is not a regular file');
}

function readHeader(fd: number, { size }: BigIntStats): { json: Record<string, unknown>; end: number } {
  if (size > BigInt(Number.MAX_SAFE_INTEGER)) throw new Malformed(`a size of ${size} bytes is too large`);
  const prefix = Buffer.alloc(8);
  if (readFully(fd, prefix, 0) < 8) throw new Malformed(`${size} bytes are too few for a header length`);
  const length = prefix.readBigUInt64LE();
  if (length > BigInt(MAX_HEADER))
    throw new Malformed(`a header of ${length} bytes is above the limit of ${MAX_HEADER}`);
  if (length + 8n > size)
    throw new Malformed(`a header of ${length} bytes does not fit into a file of ${size} bytes`);
  const text = Buffer.alloc(Number(length));
  if (readFully(fd, text, 8) < text.length) throw new Malformed('the file ends inside the header');
  if (text[0] !== 0x7b) throw new Malformed('the header does not start with "{"');
  try {
    return { json: parseJson(text) as Record<string, unknown>, end: 8 + text.length };
  } catch (error) {
    throw new Malformed(`the header is not valid JSON: ${(error as Error).message}`);
  }
}

function metadataOf(header: Record<string, unknown>): Map<string, string> {
  const metadata = Object.hasOwn(header, '__metadata__') ? header.__metadata__ : {};
  if (!isObject(metadata)) throw new Malformed('__metadata__ is not an object');
  for (const [key, value] of Object.entries(metadata))
    if (typeof value !== 'string') throw new Malformed(`__metadata__ ${shown(key)} is not a string`);
  return new Map(Object.entries(metadata as Record<string, string>));
}

/** Every tensor checked alone, then all together: they must cover the data exactly, in some order. */
function tensorsOf(header: Record<string, unknown>, start: number, size: number): Map<string, StoredTensor> {
  const entries = Object.entries(header).filter(([name]) => name !== '__metadata__');
  if (entries.length > MAX_TENSORS)
    throw new Malformed(`${entries.length} tensors are more than ${MAX_TENSORS}`);
  const tensors = new Map(entries.map(([name, entry]) => [name, tensorOf(name, entry, start)]));
  let end = start;
  for (const [name, tensor] of [...tensors].sort(([, a], [, b]) => a.offset - b.offset)) {
    if (tensor.offset !== end) {
      const what = tensor.offset < end ? 'overlaps the one before it' : 'leaves a hole before it';
      throw new Malformed(`tensor ${shown(name)} at byte ${tensor.offset} ${what}, which ends at ${end}`);
    }
    end += tensor.bytes;
  }
  if (end !== size) throw new Malformed(`the tensors end at byte ${end} but the file has ${size} bytes`);
  return tensors;
}

function tensorOf(name: string, entry: unknown, start: number): StoredTensor {
  const bad = (why: string) => new Malformed(`tensor ${shown(name)}: ${why}`);
  if (!isObject(entry)) throw bad('its entry is not an object');
  const { dtype, shape, data_offsets: offsets, ...others } = entry;
  for (const key of Object.keys(others)) throw bad(`unknown field ${shown(key)}`);
  if (typeof dtype !== 'string' || !Object.hasOwn(DTYPE_BYTES, dtype))
    throw bad(`unknown dtype ${shown(dtype)}`);
  if (!isCounts(shape) || shape.length > MAX_RANK) throw bad(`bad shape ${shown(shape)}`);
  if (!isCounts(offsets) || offsets.length !== 2) throw bad(`bad data_offsets ${shown(offsets)}`);
  let bytes: number = DTYPE_BYTES[dtype as StoredDtype];
  for (const axis of shape) {
    bytes *= axis;
    if (!Number.isSafeInteger(bytes)) throw bad(`shape ${shown(shape)} overflows`);
  }
  const [from, to] = offsets as [number, number];
  // No model has an empty tensor, and one that shares its offset with another fools readers that look up by offset.
  if (bytes === 0) throw bad(`shape ${shown(shape)} is empty`);
  if (to - from !== bytes)
    throw bad(`${shown(shape)} of ${dtype} takes ${bytes} bytes but data_offsets span ${to - from}`);
  return { dtype: dtype as StoredDtype, shape, offset: start + from, bytes };
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0 && !Object.is(n, -0));
}

/** Reads until `buffer` is full or the file ends; returns the bytes read. */
function readFully(fd: number, buffer: Buffer, position: number): number {
  let done = 0;
  while (done < buffer.length) {
    const read = readSync(fd, buffer, done, Math.min(buffer.length - done, 2 ** 30), position + done);
    if (read === 0) break;
    done += read;
  }
  return done;
}
