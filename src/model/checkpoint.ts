// A Hugging Face checkpoint folder, opened and checked: config, index, shards and tensors must all tell the same story
// before a byte of weights is read.

import { existsSync, readdirSync, realpathSync } from 'node:fs';
import { basename, dirname, join, sep } from 'node:path';
import { fail, shown } from '../errors.js';
import { type ModelConfig, readModelConfig } from './config.js';
import { isObject, readJsonFile } from './json.js';
import { SafetensorsFile, type StoredTensor } from './safetensors.js';
import { tensorSplits } from './shard.js';

export const INDEX = 'model.safetensors.index.json';
const SINGLE = 'model.safetensors';

/** Towers that a text run does not read, by the start of their tensors' names. */
const SKIPPED = ['model.vision_tower.', 'model.embed_vision.', 'model.audio_tower.', 'model.embed_audio.'];

export interface Checkpoint {
  readonly dir: string;
  readonly config: ModelConfig;
  /** Where the text tensor `name` (without the checkpoint's prefix) lies. All are BF16 with the shapes of the config. */
  tensor(name: string): StoredTensor & { fd: number };
  /** Call after the last read. TP_FILE_CHANGED. */
  requireUnchanged(): void;
  close(): void;
}

/**
 * Opens a checkpoint folder: `model.safetensors`, or an index and its shards. Throws TP_CONFIG_*, TP_CHECKPOINT,
 * TP_SAFETENSORS, TP_TENSOR_* and TP_FILE_*, and leaves no file open then.
 */
export function openCheckpoint(dir: string): Checkpoint {
  const config = readModelConfig(dir);
  const files = new Map<string, SafetensorsFile>();
  const close = () => {
    for (const file of files.values()) file.close();
  };
  try {
    const index = readIndex(dir);
    for (const name of index ? new Set(index.values()) : [SINGLE])
      files.set(name, new SafetensorsFile(insideOf(dir, name)));
    const places = placesOf(files);
    if (index) requireAgreement(dir, index, places);
    requireTensors(dir, config, places);
    return {
      dir,
      config,
      tensor: (name) => {
        const { file, tensor } = places.get(config.tensorPrefix + name)!;
        return { ...tensor, fd: file.fd };
      },
      requireUnchanged: () => {
        for (const file of files.values()) file.requireUnchanged();
      },
      close,
    };
  } catch (error) {
    close();
    throw error;
  }
}

/** Tensor name -> shard file name of the index; null for a checkpoint of one file. */
function readIndex(dir: string): Map<string, string> | null {
  const path = join(dir, INDEX);
  if (!existsSync(path)) {
    if (existsSync(join(dir, SINGLE))) return null;
    throw fail('TP_CHECKPOINT', dir, `it has neither ${INDEX} nor ${SINGLE}`);
  }
  const json = readJsonFile(path);
  const map = isObject(json) ? json.weight_map : undefined;
  if (!isObject(map)) throw fail('TP_CHECKPOINT', dir, `${INDEX} has no weight_map`);
  const index = new Map<string, string>();
  for (const [name, file] of Object.entries(map)) {
    // A plain name only: "../x" or "/etc/x" would read outside the folder.
    if (typeof file !== 'string' || !/^[\w][\w.-]*\.safetensors$/.test(file))
      throw fail(
        'TP_CHECKPOINT',
        dir,
        `${INDEX} puts ${shown(name)} into ${shown(file)}, not a plain .safetensors file name`,
      );
    index.set(name, file);
  }
  const listed = new Set(index.values());
  for (const file of readdirSync(dir))
    if (/^model.*\.safetensors$/.test(file) && !listed.has(file))
      throw fail('TP_CHECKPOINT', dir, `${file} is an extra shard that ${INDEX} does not name`);
  return index;
}

/** The real path of a shard. It must lie in the folder, or in the blobs that a Hugging Face cache folder links to. */
function insideOf(dir: string, file: string): string {
  let root: string;
  let real: string;
  try {
    root = realpathSync(dir);
    real = realpathSync(join(dir, file));
  } catch (error) {
    throw fail('TP_FILE_UNREADABLE', join(dir, file), (error as Error).message);
  }
  const roots = [root];
  if (basename(dirname(root)) === 'snapshots') roots.push(join(root, '..', '..', 'blobs'));
  if (!roots.some((r) => dirname(real) === r || real.startsWith(r + sep)))
    throw fail('TP_CHECKPOINT', dir, `${file} is a link that leaves the folder, to ${real}`);
  return real;
}

/** A tensor, and the file of the folder that holds it. */
interface Place {
  shard: string;
  file: SafetensorsFile;
  tensor: StoredTensor;
}

function placesOf(files: ReadonlyMap<string, SafetensorsFile>): Map<string, Place> {
  const places = new Map<string, Place>();
  for (const [shard, file] of files)
    for (const [name, tensor] of file.tensors) {
      const other = places.get(name);
      if (other)
        throw fail(
          'TP_CHECKPOINT',
          dirname(file.path),
          `both ${other.shard} and ${shard} hold ${shown(name)}`,
        );
      places.set(name, { shard, file, tensor });
    }
  return places;
}

/** The index and the shards name the same tensors in the same files. */
function requireAgreement(
  dir: string,
  index: ReadonlyMap<string, string>,
  places: ReadonlyMap<string, Place>,
): void {
  for (const [name, shard] of index)
    if (places.get(name)?.shard !== shard)
      throw fail('TP_CHECKPOINT', dir, `${INDEX} puts ${shown(name)} into ${shard}, which does not hold it`);
  for (const [name, { shard }] of places)
    if (!index.has(name))
      throw fail('TP_CHECKPOINT', dir, `${shard} holds ${shown(name)}, which ${INDEX} does not name`);
}

/** Every tensor of the config is there with its shape, and nothing that would have to be computed with is left over. */
function requireTensors(dir: string, config: ModelConfig, places: ReadonlyMap<string, Place>): void {
  const expected = new Set<string>();
  for (const split of tensorSplits(config)) {
    const name = config.tensorPrefix + split.name;
    const place = places.get(name);
    if (!place) throw fail('TP_TENSOR_MISSING', name, dir);
    const { shape, dtype } = place.tensor;
    if (shape.length !== split.shape.length || shape.some((n, axis) => n !== split.shape[axis]))
      throw fail('TP_TENSOR_SHAPE', name, split.shape, shape, place.file.path);
    if (dtype !== 'BF16') throw fail('TP_TENSOR_DTYPE', name, dtype, place.file.path);
    expected.add(name);
  }
  for (const [name, { file }] of places)
    if (!expected.has(name) && !SKIPPED.some((prefix) => name.startsWith(prefix)))
      throw fail('TP_TENSOR_UNEXPECTED', shown(name), file.path);
}
