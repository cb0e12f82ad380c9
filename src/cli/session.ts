// One run from launch to close, and the facts about it that every result carries.

import { nameOf, type RunSpec } from '../engine/job.js';
import { launch, type Run } from '../engine/launcher.js';
import { launchAgain } from '../engine/recovery.js';
import type { RunFacts } from '../report/schema.js';
import { requireLogDir } from './folder.js';
import { workerEnvironment } from './nodes.js';
import type { Options } from './options.js';

export interface Session {
  run: Run;
  facts: RunFacts;
}

/** Starts a run, lets `work` use it and ends it, whatever happens. */
export async function withRun<T>(
  options: Options,
  spec: RunSpec,
  work: (session: Session) => Promise<T>,
): Promise<T> {
  requireLogDir(spec.logDir);
  const started = performance.now();
  const start = () => launch(spec, { env: workerEnvironment(options) }, options.cluster);
  const run = await launchAgain(start, options.maxRestarts);
  try {
    return await work({ run, facts: factsOf(spec, run, (performance.now() - started) / 1000) });
  } finally {
    await run.close();
  }
}

function factsOf(spec: RunSpec, run: Run, loadS: number): RunFacts {
  const { model } = spec;
  return {
    tp: spec.ranks,
    device: spec.device,
    collective: run.collective.name,
    collective_why: run.collective.why,
    dtype: spec.dtype,
    model: nameOf(model),
    weights_seed: model.kind === 'checkpoint' ? null : model.seed,
    threads: spec.threads,
    isa: spec.isa,
    eager: spec.eager,
    sequences: spec.limits.sequences,
    load_s: loadS,
    stage_ms: slowest(run.ranks.map(({ stageMs }) => stageMs)),
    weight_bytes: run.ranks.map(({ weightBytes }) => weightBytes),
    cache_bytes: run.ranks.map(({ cacheBytes }) => cacheBytes),
  };
}

/** The longest time of each stage. */
function slowest(ranks: readonly Readonly<Record<string, number>>[]): Record<string, number> {
  const stages = [...new Set(ranks.flatMap((stageMs) => Object.keys(stageMs)))];
  return Object.fromEntries(
    stages.map((stage) => [stage, Math.max(...ranks.map((stageMs) => stageMs[stage] ?? 0))]),
  );
}
