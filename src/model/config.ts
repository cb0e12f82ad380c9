// The model's shape, read from a Hugging Face config.json (both forms) into one flat, checked object.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { familyOf } from './families.js';
import { readJsonFile } from './json.js';

/** One decoder layer. Full-model sizes: sharding happens in plan.ts. */
export interface LayerConfig {
  kind: 'sliding' | 'full';
  numHeads: number;
  numKvHeads: number;
  headDim: number;
  /** Positions a query sees, its own included; null = all. */
  window: number | null;
  /** v is the raw k projection (no v_proj in the checkpoint). */
  kEqV: boolean;
  rope: Rope;
}

export interface Rope {
  type: 'default' | 'proportional';
  theta: number;
  /** Pairs (i, i + headDim/2), i < rotaryPairs, that rotate; the others pass through. */
  rotaryPairs: number;
}

export interface ModelConfig {
  family: 'gemma4-moe';
  hiddenSize: number;
  vocabSize: number;
  layers: LayerConfig[];
  intermediateSize: number;
  numExperts: number;
  topKExperts: number;
  moeIntermediateSize: number;
  rmsNormEps: number;
  /** logits = cap * tanh(logits / cap); null = none. */
  finalLogitSoftcap: number | null;
  maxPositions: number;
  bosTokenId: number;
  /** Union of config.json and generation_config.json. */
  eosTokenIds: number[];
  padTokenId: number;
  /** Checkpoint prefix of the text tensors: `model.` or `model.language_model.`. */
  tensorPrefix: string;
}

/** Where `parseModelConfig` stands: names in messages, and how strict it is with keys it does not know. */
export interface ConfigOrigin {
  /** Prefix of every key in messages. */
  where: string;
  /**
   * `all`: any unknown key is an error (files of configs/). `suspicious`: only keys that could change the numbers are
   * (a checkpoint's config.json may carry keys that do not concern us).
   */
  refuse: 'all' | 'suspicious';
}

/** Reads config.json and generation_config.json of a checkpoint folder. TP_FILE_UNREADABLE, TP_JSON, TP_CONFIG_*. */
export function readModelConfig(dir: string): ModelConfig {
  const path = join(dir, 'config.json');
  const generation = join(dir, 'generation_config.json');
  return parseModelConfig(readJsonFile(path), existsSync(generation) ? readJsonFile(generation) : undefined, {
    where: `${path}: `,
    refuse: 'suspicious',
  });
}

/** Checks a parsed config.json (and generation_config.json, for its stop tokens). TP_CONFIG_*. */
export function parseModelConfig(
  config: unknown,
  generation?: unknown,
  origin: ConfigOrigin = { where: 'config.json: ', refuse: 'suspicious' },
): ModelConfig {
  return familyOf(config, origin)(config, generation, origin);
}
