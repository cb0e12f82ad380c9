// The model of a run, opened by a rank: its shape and where its weights come from.

import { openCheckpoint } from '../model/checkpoint.js';
import type { ModelConfig } from '../model/config.js';
import { readConfigFile } from '../model/configfile.js';
import type { WeightSource } from '../model/weights.js';
import type { ModelSource } from './job.js';

export interface OpenModel {
  config: ModelConfig;
  source: WeightSource;
  /** Call when the weights are loaded. */
  close(): void;
}

/** TP_FILE_*, TP_CONFIG_*, TP_CHECKPOINT, TP_SAFETENSORS, TP_TENSOR_*. */
export function openModel(model: ModelSource): OpenModel {
  if (model.kind === 'checkpoint') {
    const checkpoint = openCheckpoint(model.dir);
    const { config } = checkpoint;
    return { config, source: { kind: 'checkpoint', checkpoint }, close: () => checkpoint.close() };
  }
  const { config } = readConfigFile(model.file);
  return { config, source: { kind: 'synthetic', seed: model.seed, config }, close: () => {} };
}
