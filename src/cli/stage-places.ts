// What the steps of a model's plan are called where somebody reads their times.

import type { ModelConfig } from '../model/config.js';
import { makePlan } from '../model/plan.js';
import type { StagePlace } from '../report/stages.js';

/** In the order of the plan, which is the same on every rank. */
export function stagePlaces(config: ModelConfig): StagePlace[] {
  const { steps, layers } = makePlan(config, 0, 1);
  return steps.map(({ op, stage, layer }) => {
    const sync = op === 'allReduce' || op === 'allGather';
    const kind = layer < 0 ? 'head' : layers[layer]!.window > 0 ? 'sliding' : 'full';
    return { name: sync ? `${op} ${stage}` : stage, kind, layer, sync };
  });
}
