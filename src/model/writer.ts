// Writing safetensors files as a stream. The file appears under its name only when it is whole.

import { closeSync, fsyncSync, openSync, renameSync, rmSync, statSync, writeSync } from 'node:fs';
import { fail } from '../errors.js';
import { DTYPE_BYTES, type StoredDtype } from './safetensors.js';

/** A tensor to be written; no axis may be 0. */
export interface TensorToWrite {
  name: string;
  dtype: StoredDtype;
  shape: readonly number[];
}

/**
 * Writes the header at once and then the data in pieces, in the order of the tensors, into a neighbour of `path` that
 * `finish` renames. Every failure is TP_FILE_UNWRITABLE and leaves nothing behind.
 */
export class SafetensorsWriter {
  readonly path: string;
  readonly #temporary: string;
  #fd: number | null = null; // null: finished or given up
  #left: number;

  constructor(
    path: string,
    tensors: readonly TensorToWrite[],
    metadata: Readonly<Record<string, string>> = {},
  ) {
    this.path = path;
    this.#temporary = `${path}.${process.pid}.tmp`;
    this.#try(() => {
      // Renaming onto a device such as /dev/null would replace it.
      const old = statSync(path, { throwIfNoEntry: false });
      if (old && !old.isFile()) throw new Error('it is there and not a regular file');
      this.#fd = openSync(this.#temporary, 'wx');
    });
    this.#left = tensors.reduce((bytes, tensor) => bytes + sizeOf(tensor), 0);
    this.#put(header(tensors, metadata));
  }

  /** Appends bytes of the tensors. */
  write(bytes: Uint8Array): void {
    this.#left -= bytes.byteLength;
    this.#put(bytes);
  }

  /** Makes the file durable and gives it its name. TP_INTERNAL when bytes are missing or too many. */
  finish(): void {
    if (this.#left !== 0) {
      this.abort();
      throw fail('TP_INTERNAL', `${this.path}: ${this.#left} bytes of its tensors were not written`);
    }
    this.#try(() => {
      fsyncSync(this.#fd!);
      renameSync(this.#temporary, this.path);
    });
    closeSync(this.#fd!);
    this.#fd = null;
  }

  /** Gives up and removes what was written; nothing after `finish`. */
  abort(): void {
    if (this.#fd === null) return;
    closeSync(this.#fd);
    this.#fd = null;
    rmSync(this.#temporary, { force: true });
  }

  #put(bytes: Uint8Array): void {
    this.#try(() => {
      for (let done = 0; done < bytes.byteLength; ) done += writeSync(this.#fd!, bytes, done);
    });
  }

  #try(action: () => void): void {
    try {
      action();
    } catch (error) {
      this.abort();
      throw fail('TP_FILE_UNWRITABLE', this.path, (error as Error).message);
    }
  }
}

/** Refuses a place where no file can be made, before hours of work are spent on one. TP_FILE_UNWRITABLE. */
export function requireWritable(path: string): void {
  new SafetensorsWriter(path, []).abort();
}

function sizeOf({ dtype, shape }: TensorToWrite): number {
  return shape.reduce((bytes, axis) => bytes * axis, DTYPE_BYTES[dtype]);
}

/** Length and JSON, padded with spaces so that the data starts at a multiple of 8. */
function header(tensors: readonly TensorToWrite[], metadata: Readonly<Record<string, string>>): Buffer {
  const entries: [string, unknown][] = [['__metadata__', metadata]];
  let from = 0;
  for (const tensor of tensors) {
    const to = from + sizeOf(tensor);
    entries.push([tensor.name, { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [from, to] }]);
    from = to;
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const length = Math.ceil(json.length / 8) * 8;
  const bytes = Buffer.alloc(8 + length, ' ');
  bytes.writeBigUInt64LE(BigInt(length));
  json.copy(bytes, 8);
  return bytes;
}
