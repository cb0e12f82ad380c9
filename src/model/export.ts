// A synthetic model as a Hugging Face checkpoint, so that other engines load exactly the same weights.

import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { fail } from '../errors.js';
import { native } from '../native.js';
import { INDEX } from './checkpoint.js';
import type { ConfigFile } from './configfile.js';
import type { JsonObject } from './json.js';
import { type TensorSplit, tensorSplits } from './shard.js';
import { syntheticKey, syntheticScale } from './synthetic.js';
import { SafetensorsWriter } from './writer.js';

const MAX_SHARD_BYTES = 4e9;
const CHUNK = 1 << 22; // elements made at a time

/** Fills `out` with elements [start, start + out.length) of a synthetic tensor, as bfloat16 bits. */
export type Synthesize = ReturnType<typeof native>['synthesize'];

export interface ExportOptions {
  /** Overrides the file's seed. */
  seed?: number;
  /** Largest shard; a tensor that is larger gets a shard of its own. */
  maxShardBytes?: number;
  onProgress?: (bytes: number, total: number) => void;
  /** By default the addon's. */
  synthesize?: Synthesize;
}

/**
 * Writes config.json, generation_config.json, the shards and their index into `dir`, which must be empty or absent.
 * A failure removes what was written. TP_EXPORT_FOLDER, TP_FILE_UNWRITABLE.
 */
export async function exportCheckpoint(
  dir: string,
  file: ConfigFile,
  options: ExportOptions = {},
): Promise<void> {
  const { tensorPrefix: prefix } = file.config;
  requireEmptyFolder(dir);
  const written: string[] = [];
  const place = (name: string) => {
    written.push(join(dir, name));
    return join(dir, name);
  };
  try {
    const shards = shardsOf(tensorSplits(file.config), options.maxShardBytes ?? MAX_SHARD_BYTES);
    const total = shards.flat().reduce((bytes, tensor) => bytes + bytesOf(tensor), 0);
    const map: [tensor: string, shard: string][] = [];
    let done = 0;
    for (const [i, tensors] of shards.entries()) {
      const shard = `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`;
      for await (const bytes of writeShard(place(shard), tensors, file, options)) {
        done += bytes;
        options.onProgress?.(done, total);
      }
      map.push(...tensors.map(({ name }): [string, string] => [prefix + name, shard]));
    }
    writeText(place('config.json'), configText(file.huggingFace));
    writeText(place('generation_config.json'), json(generationConfig(file)));
    const weightMap = Object.fromEntries(map.sort(([a], [b]) => (a < b ? -1 : 1)));
    writeText(place(INDEX), json({ metadata: { total_size: total }, weight_map: weightMap }));
  } catch (error) {
    for (const path of written) rmSync(path, { force: true });
    throw error;
  }
}

/** Writes one shard; yields the bytes of each piece, and lets other work in between (Ctrl-C, progress). */
async function* writeShard(
  path: string,
  tensors: readonly TensorSplit[],
  { config, seed: ownSeed }: ConfigFile,
  { seed = ownSeed, synthesize = native().synthesize }: ExportOptions,
): AsyncGenerator<number> {
  const stored = tensors.map(
    ({ name, shape }) => ({ name: config.tensorPrefix + name, dtype: 'BF16', shape }) as const,
  );
  const writer = new SafetensorsWriter(path, stored, { format: 'pt' });
  try {
    for (const tensor of tensors) {
      const { scale, offset } = syntheticScale(tensor.name, config);
      const elements = bytesOf(tensor) / 2;
      for (let start = 0; start < elements; start += CHUNK) {
        const piece = new Uint16Array(Math.min(CHUNK, elements - start));
        synthesize(piece, start, syntheticKey(seed, tensor.name), scale, offset);
        writer.write(new Uint8Array(piece.buffer)); // little-endian, as the format wants and as every machine here is
        yield piece.byteLength;
        await setImmediate();
      }
    }
    writer.finish();
  } finally {
    writer.abort();
  }
}

/** Tensors in order, cut into shards of at most `limit` bytes (a larger tensor stands alone). */
function shardsOf(tensors: readonly TensorSplit[], limit: number): TensorSplit[][] {
  const shards: TensorSplit[][] = [[]];
  let bytes = 0;
  for (const tensor of tensors) {
    if (bytes > 0 && bytes + bytesOf(tensor) > limit) {
      shards.push([]);
      bytes = 0;
    }
    shards.at(-1)!.push(tensor);
    bytes += bytesOf(tensor);
  }
  return shards;
}

function bytesOf({ shape }: TensorSplit): number {
  return shape.reduce((bytes, axis) => bytes * axis, 2);
}

function number(n: number): string {
  return String(n).padStart(5, '0');
}

function generationConfig({ config }: ConfigFile): JsonObject {
  return {
    bos_token_id: config.bosTokenId,
    eos_token_id: config.eosTokenIds,
    pad_token_id: config.padTokenId,
  };
}

/** transformers refuses a whole number where its config class says float, and JSON.stringify drops the ".0". */
function configText(config: JsonObject): string {
  return json(config).replace(
    /("(?:final_logit_softcapping|rms_norm_eps|initializer_range)": \d+)(?=[,\n])/g,
    '$1.0',
  );
}

function json(value: unknown): string {
  return `${JSON.stringify(value, null, 2)}\n`;
}

function writeText(path: string, text: string): void {
  try {
    writeFileSync(path, text);
  } catch (error) {
    throw fail('TP_FILE_UNWRITABLE', path, (error as Error).message);
  }
}

function requireEmptyFolder(dir: string): void {
  let found: string[];
  try {
    // Not recursive: Node turns forever when a parent such as /proc says that it does not exist.
    if (!existsSync(dir)) mkdirSync(dir);
    found = readdirSync(dir);
  } catch (error) {
    throw fail('TP_FILE_UNWRITABLE', dir, (error as Error).message);
  }
  if (found.length) throw fail('TP_EXPORT_FOLDER', dir, found[0]!);
}
