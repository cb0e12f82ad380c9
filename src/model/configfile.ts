// Files of configs/: a model shape in Hugging Face form, a seed for its weights, and options of the run. Unlike a
// checkpoint's config.json these are written for tp-run, so a key that nobody knows is an error at every depth.

import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { fail } from '../errors.js';
import { type ModelConfig, parseModelConfig } from './config.js';
import { Fields } from './fields.js';
import { type JsonObject, readJsonFile } from './json.js';

/** The model that runs when none is named. */
export const DEFAULT_CONFIG_FILE = fileURLToPath(new URL('../../configs/tiny.json', import.meta.url));

const positive = z.int().positive();
const tokenIds = z.array(z.int().nonnegative()).min(1);

/** Flags of the command line that a file may preset, by the flag's own name. */
const RunOptions = z.strictObject({
  gpus: positive.optional(),
  dtype: z.enum(['bfloat16', 'float32']).optional(),
  'prompt-ids': z.array(tokenIds).min(1).optional(),
  'max-tokens': positive.optional(),
  'max-model-len': positive.optional(),
  temperature: z.number().nonnegative().optional(),
  'top-k': z.int().nonnegative().optional(),
  'top-p': z.number().positive().max(1).optional(),
  'ignore-eos': z.boolean().optional(),
});
export type RunOptions = z.infer<typeof RunOptions>;

export interface ConfigFile {
  path: string;
  config: ModelConfig;
  /** The config in Hugging Face form, as the file has it. */
  huggingFace: JsonObject;
  /** Seed of the synthetic weights. */
  seed: number;
  options: RunOptions;
}

/** Reads a file of configs/. TP_FILE_UNREADABLE, TP_JSON, TP_CONFIG_*. */
export function readConfigFile(path: string): ConfigFile {
  const file = new Fields(`${path}: `, readJsonFile(path));
  const huggingFace = file.required('config') as JsonObject;
  const config = parseModelConfig(huggingFace, undefined, { where: `${path}: config.`, refuse: 'all' });
  const seed = file.integer('seed', 0, Number.MAX_SAFE_INTEGER);
  const options = RunOptions.safeParse(file.raw('options') ?? {});
  if (!options.success) refuseOptions(`${path}: options.`, options.error);
  for (const [key] of file.unread()) throw fail('TP_CONFIG_KEY', file.where, key);
  return { path, config, huggingFace, seed, options: options.data };
}

function refuseOptions(where: string, error: z.ZodError): never {
  const issue = error.issues[0]!;
  if (issue.code === 'unrecognized_keys') throw fail('TP_CONFIG_KEY', where, issue.keys[0]!);
  throw fail('TP_CONFIG_VALUE', `${where}${issue.path.join('.')}`, issue.message);
}
