// The model that the command line names: a checkpoint folder, a file of configs/, or the embedded tiny model.

import { statSync } from 'node:fs';
import type { ModelSource } from '../engine/job.js';
import { fail } from '../errors.js';
import { openCheckpoint } from '../model/checkpoint.js';
import type { ModelConfig } from '../model/config.js';
import { DEFAULT_CONFIG_FILE, type RunOptions, readConfigFile } from '../model/configfile.js';

export interface NamedModel {
  source: ModelSource;
  config: ModelConfig;
  /** Presets of a file of configs/. */
  presets: RunOptions;
}

/**
 * Opens the model of `--model` as far as its shape. A checkpoint is checked whole, headers of all shards included, so
 * that a bad one is refused before any process starts. TP_FILE_*, TP_CONFIG_*, TP_CHECKPOINT, TP_TENSOR_*.
 */
export function openModel(path: string | null, seed: number | null): NamedModel {
  if (path !== null && isFolder(path)) {
    const checkpoint = openCheckpoint(path);
    checkpoint.close();
    return { source: { kind: 'checkpoint', dir: path }, config: checkpoint.config, presets: {} };
  }
  const file = readConfigFile(path ?? DEFAULT_CONFIG_FILE);
  return {
    source: { kind: 'synthetic', file: file.path, seed: seed ?? file.seed },
    config: file.config,
    presets: file.options,
  };
}

/** Flags that the model of `--model` presets, by name; {} for a checkpoint. */
export function presetsOf(path: string | null): RunOptions {
  return path !== null && isFolder(path) ? {} : readConfigFile(path ?? DEFAULT_CONFIG_FILE).options;
}

function isFolder(path: string): boolean {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat) throw fail('TP_FILE_UNREADABLE', path, 'there is no such file or folder');
  return stat.isDirectory();
}
