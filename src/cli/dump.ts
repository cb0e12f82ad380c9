// `--dump-logits`: the logits rows of every prompt as one safetensors file.

import { statfsSync } from 'node:fs';
import { dirname } from 'node:path';
import { fail } from '../errors.js';
import { requireWritable, SafetensorsWriter } from '../model/writer.js';

/** Refuses, before a run starts, a place that cannot take `values` fp32 numbers. TP_FILE_UNWRITABLE. */
export function requireRoom(path: string, values: number): void {
  requireWritable(path);
  const { bavail, bsize } = statfsSync(dirname(path));
  const bytes = values * 4;
  if (bytes > bavail * bsize) {
    throw fail('TP_FILE_UNWRITABLE', path, `${mega(bytes)} are needed and ${mega(bavail * bsize)} are free`);
  }
}

/** Writes `prompt.<i>.logits`, fp32 [tokens, vocab], whole or not at all. TP_FILE_UNWRITABLE. */
export function writeLogits(path: string, prompts: readonly (readonly Float32Array[])[]): void {
  const writer = new SafetensorsWriter(
    path,
    prompts.map((rows, i) => ({
      name: `prompt.${i}.logits`,
      dtype: 'F32',
      shape: [rows.length, rows[0]?.length ?? 0],
    })),
  );
  for (const row of prompts.flat()) writer.write(new Uint8Array(row.buffer, row.byteOffset, row.byteLength));
  writer.finish();
}

function mega(bytes: number): string {
  return `${Math.ceil(bytes / 1e6)} MB`;
}
