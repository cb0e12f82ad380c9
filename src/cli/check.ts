// `tp-run check`: lays runs beside each other bit for bit over the axes tp, batch and repeat, and proves with a planted
// fault that it would have seen a difference.

import type { RunSpec } from '../engine/job.js';
import { EXIT, fail, listOf } from '../errors.js';
import { log } from '../log.js';
import { makePlan } from '../model/plan.js';
import { details, verdictLine } from '../report/check.js';
import { provenance } from '../report/provenance.js';
import type { CheckResult, RunFacts } from '../report/schema.js';
import { Checker, type PlannedFault, RanksDisagree } from './checker.js';
import { chooseDevice } from './device.js';
import { checkPrompts } from './made-prompts.js';
import { openModel } from './model.js';
import { type FaultPlace, type Options, ranksOf } from './options.js';
import { print, printJson, requireOut, writeResult } from './output.js';
import { longestOf, readPrompts } from './prompts.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';

/** Most tokens of a step whose rows are blind to each other on GPUs, whatever the model; see README.md. */
const BATCH_INVARIANT_TOKENS = 8;

export async function check(options: Options): Promise<number> {
  requireOut(options);
  const { maxTokens, level } = options;
  const ranks = ranksOf(options);
  const model = openModel(options.model, options.seed);
  const given = options.prompt.length + options.promptIds.length > 0 || options.prompts !== null;
  const prompts = given
    ? readPrompts(options, model, maxTokens).map(({ ids }) => ids)
    : checkPrompts(model.config, maxTokens);
  const steps = makePlan(model.config, 0, 1).steps;
  const fault = (at: FaultPlace, sequence: number): PlannedFault => ({
    ...requireFaultPlace(at, ranks, steps),
    sequence,
    position: prompts[sequence]!.length - 1,
  });
  const layer = Math.min(3, model.config.layers.length - 1);
  const control = fault({ layer, stage: 'attention', rank: null }, prompts.length - 1);
  const planted = options.plantFault && fault(options.plantFault, prompts.length >> 1);
  const chosen = chooseDevice(options);
  // Longer steps may round in their own way there.
  const prefillChunk =
    chosen.device === 'cuda' ? Math.min(options.prefillChunk, BATCH_INVARIANT_TOKENS) : options.prefillChunk;
  const specOf = (ranks: number) =>
    runSpec({ ...options, prefillChunk }, model, chosen, {
      ranks,
      sequences: Math.min(options.batch, prompts.length),
      positions: longestOf(prompts) + maxTokens,
      everyRow: false,
      candidates: 1,
      trace: true,
    });
  const [single, spec] = [specOf(1), specOf(ranks)];
  if (chosen.line) log.info(chosen.line);

  const checker = new Checker(level, prompts, maxTokens, ranks);
  const facts = await runAll(options, checker, single, spec, control, planted);
  const verdict = checker.axes.some(({ equal }) => !equal)
    ? 'fail'
    : checker.control?.detected
      ? 'pass'
      : 'control-missed';
  const judged = {
    verdict,
    level,
    prompts: prompts.length,
    max_tokens: maxTokens,
    axes: checker.axes,
    control: checker.control,
  } as const;
  const line = verdictLine({ ...judged, tp: ranks });
  const result: CheckResult = {
    schema: 'tp-run/check/1',
    line,
    ...judged,
    run: facts,
    provenance: provenance(),
  };
  writeResult(options, result);
  if (options.json) printJson(result);
  else print(`${line}\n${details(judged)}`);
  return { pass: EXIT.ok, fail: EXIT.no, 'control-missed': EXIT.control }[verdict];
}

/**
 * One rank makes the base; the ranks of `spec` do the same work in several ways, for `repeat` in fresh processes.
 * A run whose ranks disagree among themselves is over, and so is the check: its axis says what happened.
 */
async function runAll(
  options: Options,
  checker: Checker,
  single: RunSpec,
  spec: RunSpec,
  control: PlannedFault,
  planted: PlannedFault | null,
): Promise<RunFacts> {
  let facts!: RunFacts;
  const { repeats } = options;
  const total = 2 + repeats;
  log.info(`run 1 of ${total}: the base, tp=1`);
  await withRun(options, single, (session) => {
    facts = session.facts;
    return checker.makeBase(session.run);
  });
  try {
    log.info(`run 2 of ${total}: tp, batch and control, tp=${spec.ranks}`);
    await withRun(options, spec, async (session) => {
      facts = session.facts;
      const { run } = session;
      if (spec.ranks > 1) await checker.compareTp(run, planted);
      await checker.compareBatches(run);
      await checker.runControl(run, control);
    });
    for (let i = 1; i <= repeats; i++) {
      log.info(`run ${2 + i} of ${total}: repeat, tp=${spec.ranks}`);
      await withRun(options, spec, ({ run }) =>
        checker.compareRepeat(run, i, spec.ranks === 1 ? planted : null),
      );
    }
  } catch (error) {
    if (!(error instanceof RanksDisagree)) throw error;
  }
  return facts;
}

/** The place, which the plan must have. TP_FAULT_PLACE. */
function requireFaultPlace(
  { layer, stage, rank }: FaultPlace,
  ranks: number,
  steps: readonly { layer: number; stage: string }[],
): FaultPlace {
  const top = Math.max(...steps.map((step) => step.layer));
  if (layer > top) throw fail('TP_FAULT_PLACE', 'layer', layer, `0 to ${top}`);
  const stages = [...new Set(steps.filter((step) => step.layer === layer).map((step) => step.stage))];
  if (!stages.includes(stage)) throw fail('TP_FAULT_PLACE', 'stage', stage, listOf(stages));
  if (rank !== null && rank >= ranks) throw fail('TP_FAULT_PLACE', 'rank', rank, `0 to ${ranks - 1}`);
  return { layer, stage, rank };
}
