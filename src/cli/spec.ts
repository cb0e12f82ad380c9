// The frozen description of a run, from options and the work that it is for.

import type { RunSpec } from '../engine/job.js';
import { fail, listOf } from '../errors.js';
import { requireSplittable } from '../model/shard.js';
import { native } from '../native.js';
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

/** The run that `needs` describes. TP_SHARD_UNEVEN when the model cannot be split over its ranks, TP_FLAG_VALUE. */
export function runSpec(options: Options, model: NamedModel, chosen: ChosenDevice, needs: Needs): RunSpec {
  requireSplittable(model.config, needs.ranks);
  requireInstructions(options.isa);
  const tokens = Math.max(options.prefillChunk, needs.sequences);
  return Object.freeze({
    model: model.source,
    ranks: needs.ranks,
    device: chosen.device,
    devices: options.cluster?.members.devices(needs.ranks) ?? chosen.devices.slice(0, needs.ranks),
    dtype: options.dtype,
    collective: options.collective,
    isa: options.isa,
    threads: options.threads ?? defaultThreads(ranksHere(options, needs.ranks)),
    limits: {
      tokens,
      rows: needs.everyRow ? tokens : needs.sequences,
      sequences: needs.sequences,
      positions: needs.positions,
      candidates: needs.candidates,
    },
    trace: needs.trace,
    eager: options.eager,
    initTimeoutMs: options.initTimeout * 1000,
    stepTimeoutMs: options.stepTimeout * 1000,
    logDir: options.logDir,
  });
}

/** Ranks of a run of `ranks` that share this host's cores. */
function ranksHere({ cluster, place }: Options, ranks: number): number {
  return cluster ? Math.min(ranks, cluster.members.ownRanks(ranks) * place.localNodes) : ranks;
}

/** TP_FLAG_VALUE when this machine's CPU lacks the instructions of `--isa`. */
function requireInstructions(isa: Options['isa']): void {
  const here: readonly string[] = ['auto', ...native().version().isa];
  if (!here.includes(isa)) throw fail('TP_FLAG_VALUE', '--isa', `${listOf(here)} on this CPU`, isa);
}
