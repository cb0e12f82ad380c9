// The frozen description of a run, from options and the work that it is for.

import type { RunSpec } from '../engine/job.js';
import { requireSplittable } from '../model/shard.js';
import type { ChosenDevice } from './device.js';
import type { NamedModel } from './model.js';
import { defaultThreads, type Options } from './options.js';

/** What the work asks of every rank. */
export interface Needs {
  ranks: number;
  /** Sequences decoded together. */
  sequences: number;
  /** Longest prompt with its new tokens. */
  positions: number;
  /** Every token of a step has a logits row (score), not only the last of each sequence. */
  everyRow: boolean;
  candidates: number;
  trace: boolean;
}

/** The run that `needs` describes. TP_SHARD_UNEVEN when the model cannot be split over its ranks. */
export function runSpec(options: Options, model: NamedModel, chosen: ChosenDevice, needs: Needs): RunSpec {
  requireSplittable(model.config, needs.ranks);
  const tokens = Math.max(options.prefillChunk, needs.sequences);
  return Object.freeze({
    model: model.source,
    ranks: needs.ranks,
    device: chosen.device,
    devices: chosen.devices.slice(0, needs.ranks),
    dtype: options.dtype,
    collective: options.collective,
    isa: options.isa,
    threads: options.threads ?? defaultThreads(needs.ranks),
    limits: {
      tokens,
      rows: needs.everyRow ? tokens : needs.sequences,
      sequences: needs.sequences,
      positions: needs.positions,
      candidates: needs.candidates,
    },
    trace: needs.trace,
    initTimeoutMs: options.initTimeout * 1000,
    stepTimeoutMs: options.stepTimeout * 1000,
    logDir: options.logDir,
  });
}
