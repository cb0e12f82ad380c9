// Tensors of a safetensors file that we trust, by name.

import { readFileSync } from 'node:fs';
import { must } from './harness.mjs';

const ARRAYS = { F32: Float32Array, I32: Int32Array };

/** A function that gives the values of a tensor; throws for a name or a type that it does not have. */
export function readSafetensors(path) {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + length));
  return (name) => {
    const tensor = header[name];
    const Values = ARRAYS[tensor?.dtype];
    must(Values, `${path} has no F32 or I32 tensor ${name}`);
    const [from, to] = tensor.data_offsets;
    const copy = new Uint8Array(to - from);
    copy.set(bytes.subarray(8 + length + from, 8 + length + to));
    return new Values(copy.buffer);
  };
}
